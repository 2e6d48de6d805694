"""grpc.health.v1 of a process: alive and ready told apart.

Owns the names: "liveness" serves from the start to the end; "readiness", "" and every service's
name serve while the process takes work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from grpc_health.v1 import health, health_pb2

LIVENESS = "liveness"
READINESS = "readiness"
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthServicer(health.aio.HealthServicer):  # pyright: ignore[reportAttributeAccessIssue]
    """The library's servicer, with a readiness switch and an end to its watches."""

    def __init__(self) -> None:
        super().__init__()
        self._names: tuple[str, ...] = ("", READINESS)
        self._is_ready = False
        self._lock = asyncio.Lock()
        self._updates: set[asyncio.Task[None]] = set()
        self._watches: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def start(self, services: Sequence[str]) -> None:
        """Live and not ready; call before the server starts."""
        self._names = ("", READINESS, *services)
        await self.set(LIVENESS, _SERVING)
        await self._publish()

    def set_ready(self, ready: bool) -> None:
        """Turns readiness; watchers hear of it at the next turn of the loop."""
        self._is_ready = ready
        task = asyncio.get_running_loop().create_task(self._publish())
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)

    async def end_watches(self) -> None:
        """Tells every watcher the last state, then ends its stream; a stop need not wait for it."""
        self._stopping = True
        await asyncio.gather(*self._updates)
        for watch in self._watches:
            watch.cancel()

    async def Watch(  # noqa: N802 - gRPC method name
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> None:
        """Streams the state of one name until the caller or the server ends it."""
        watch = asyncio.get_running_loop().create_task(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.wait({watch})
            if not watch.cancelled():
                watch.result()
        finally:
            self._watches.discard(watch)
            watch.cancel()

    async def _publish(self) -> None:
        async with self._lock:  # the last caller's state is the one that stays
            state = _SERVING if self._is_ready else _NOT_SERVING
            for name in self._names:
                await self.set(name, state)
