"""The live requests of this gateway.

Owns admission: credits, unique ids, the closed door of a drain. Never runs a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from mesh.errors import AlreadyExists, ResourceExhausted, Unavailable
from services.gateway.request import Request


class Registry:
    """Requests by id."""

    def __init__(self, max_live_requests: int) -> None:
        self._max_live_requests = max_live_requests
        self._requests: dict[str, Request] = {}
        self._is_draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_requests(self) -> int:
        """Live requests."""
        return len(self._requests)

    @property
    def num_sequences(self) -> int:
        """Live sequences."""
        return sum(request.num_sequences for request in self._requests.values())

    def check_open(self, request_id: str) -> None:
        """Refuses what cannot be admitted now, before any work is done for it."""
        if self._is_draining:
            raise Unavailable("the gateway is draining", reason="DRAINING", retryable=True)
        if request_id in self._requests:
            raise AlreadyExists(
                f"request_id: {request_id!r} names a live request", reason="DUPLICATE_REQUEST_ID"
            )
        if len(self._requests) >= self._max_live_requests:
            raise ResourceExhausted(
                f"{len(self._requests)} requests are live, the limit is "
                f"{self._max_live_requests}; try again later",
                reason="TOO_MANY_REQUESTS",
                retryable=True,
            )

    @contextmanager
    def live(self, request_id: str, request: Request) -> Iterator[None]:
        """Holds the id and a credit for the length of the block."""
        self.check_open(request_id)
        self._requests[request_id] = request
        self._empty.clear()
        try:
            yield
        finally:
            del self._requests[request_id]
            if not self._requests:
                self._empty.set()

    def abort(self, request_id: str) -> bool:
        """Ends a live request; False when there is none with this id."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        request.abort()
        return True

    async def drain(self, drain_s: float) -> None:
        """Refuses new requests and waits for the live ones; what is left then fails UNAVAILABLE."""
        self._is_draining = True
        try:
            async with asyncio.timeout(drain_s):
                await self._empty.wait()
        except TimeoutError:
            for request in self._requests.values():
                request.fail(
                    Unavailable(
                        f"the gateway shut down; the request did not end within {drain_s:g} s",
                        reason="DRAINING",
                        retryable=True,
                    )
                )
