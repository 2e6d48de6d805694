"""StatusService and rates. Never gathers what a process tells about itself: a callback does."""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from protos import status_pb2, status_pb2_grpc

Instances = status_pb2.InstanceStatus | Sequence[status_pb2.InstanceStatus]
Snapshot = Callable[[], Instances | Awaitable[Instances]]
WINDOW_S = 5.0


class StatusServicer(status_pb2_grpc.StatusServiceServicer):
    """Answers GetStatus from a callback, sync or async: one instance, or several, itself first.

    `check` raises AssertionError when the process's books do not balance.
    """

    def __init__(self, snapshot: Snapshot, check: Callable[[], None] | None = None) -> None:
        self._snapshot = snapshot
        self._check = check

    async def GetStatus(  # noqa: N802 - gRPC method name
        self, request: status_pb2.GetStatusRequest, context: Any
    ) -> status_pb2.GetStatusResponse:
        """The present state."""
        state = self._snapshot()
        if inspect.isawaitable(state):
            state = await state
        instances = [state] if isinstance(state, status_pb2.InstanceStatus) else state
        return status_pb2.GetStatusResponse(instances=instances)

    async def CheckBooks(  # noqa: N802 - gRPC method name
        self, request: status_pb2.CheckBooksRequest, context: Any
    ) -> status_pb2.CheckBooksResponse:
        """What the process's own check() says."""
        if self._check is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this process checks no books")
            raise AssertionError("abort returned")
        try:
            self._check()
        except AssertionError as error:
            return status_pb2.CheckBooksResponse(failure=str(error) or "an unnamed check failed")
        return status_pb2.CheckBooksResponse()


class Rate:
    """Events per second over the last five seconds. `clock` gives seconds and never runs back."""

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
        return self._total / WINDOW_S

    def _expire(self) -> None:
        oldest = self._clock() - WINDOW_S
        while self._events and self._events[0][0] < oldest:
            self._total -= self._events.popleft()[1]
