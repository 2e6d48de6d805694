"""What a request has for its client and the client has not read yet.

Owns the order of messages; deltas wait in their sequences, so a slow client gets fewer and longer
ones. Never drops any.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as List

from protos import gateway_pb2
from services.gateway.sequence import Sequence


class Outbox:
    """One writer side (dispatch, the request's task), one reader (the client's stream)."""

    def __init__(self) -> None:
        self._messages: list[gateway_pb2.GenerateResponse] = []
        self._sequences: List[Sequence] = ()
        self._usage: gateway_pb2.Usage | None = None
        self._error: BaseException | None = None
        self._is_closed = False
        self._has_news = asyncio.Event()

    def attach(self, sequences: List[Sequence]) -> None:
        """Names the sequences whose deltas go out; once."""
        self._sequences = sequences

    def put(self, message: gateway_pb2.GenerateResponse) -> None:
        """Queues a message that goes out before all deltas."""
        self._messages.append(message)
        self._has_news.set()

    def wake(self) -> None:
        """A sequence has something new."""
        self._has_news.set()

    def close(self, usage: gateway_pb2.Usage) -> None:
        """The answer is complete; usage goes out last."""
        self._usage = usage
        self._is_closed = True
        self._has_news.set()

    def fail(self, error: BaseException) -> None:
        """The answer cannot be completed; the reader raises this after all that is queued."""
        if not self._is_closed:
            self._error = error
            self._is_closed = True
            self._has_news.set()

    async def take(self) -> list[gateway_pb2.GenerateResponse]:
        """Waits for news; an empty list is the end. Raises the error the request failed with."""
        while True:
            messages = self._drain()
            if messages:
                return messages
            if self._error is not None:
                raise self._error
            if self._is_closed:
                return []
            self._has_news.clear()
            await self._has_news.wait()

    def _drain(self) -> list[gateway_pb2.GenerateResponse]:
        messages, self._messages = self._messages, []
        for sequence in self._sequences:
            messages.extend(sequence.take())
        if self._usage is not None:
            messages.append(gateway_pb2.GenerateResponse(usage=self._usage))
            self._usage = None
        return messages
