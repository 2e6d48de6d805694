"""StatusService and the figures a process tells about itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from protos import status_pb2, status_pb2_grpc

Snapshot = Callable[[], status_pb2.InstanceStatus | Awaitable[Sequence[status_pb2.InstanceStatus]]]
_WINDOW_S = 5.0


class StatusServicer(status_pb2_grpc.StatusServiceServicer):
    """Answers GetStatus from a callback: one instance, or (awaitable) several."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    async def GetStatus(  # noqa: N802 - gRPC method name
        self, request: status_pb2.GetStatusRequest, context: object
    ) -> status_pb2.GetStatusResponse:
        """The present state."""
        state = self._snapshot()
        if isinstance(state, status_pb2.InstanceStatus):
            return status_pb2.GetStatusResponse(instances=[state])
        return status_pb2.GetStatusResponse(instances=await state)


class Rate:
    """Events per second over the last five seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, count: int) -> None:
        """Counts events that happened now."""
        self._events.append((self._clock(), count))
        self._total += count
        self._expire()

    def per_s(self) -> float:
        """The rate now."""
        self._expire()
        return self._total / _WINDOW_S

    def _expire(self) -> None:
        oldest = self._clock() - _WINDOW_S
        while self._events and self._events[0][0] < oldest:
            self._total -= self._events.popleft()[1]
