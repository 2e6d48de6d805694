"""The one thread that posts, polls and releases transfers of a backend, and its flights.

Owns the order of calls into the backend, polling back-off and what becomes of a transfer nobody
waits for any more: it is kept until it is over. Knows neither asyncio nor NIXL; calls `on_over`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kv.errors import TransferError
from kv.transfer import Agent, Spans

log = logging.getLogger("kvmesh.transfer")

_SPINS = 8
_FIRST_WAIT_S, _LAST_WAIT_S = 0.00005, 0.002
_IDLE_WAIT_S = 1.0
_MAX_POSTED = 2  # parts of one flight: the next one is queued while the first moves


class Backend(Protocol):
    """What a library must offer; the owner thread makes every call. Failures: TransferError."""

    def add_peer(self, agent: Agent) -> None:
        """Makes a peer reachable."""
        ...

    def remove_peer(self, name: str) -> None:
        """Forgets a peer."""
        ...

    def post(self, operation: str, peer: str, part: Spans) -> object:
        """Starts moving one part; returns its handle."""
        ...

    def is_done(self, peer: str, handle: object) -> bool:
        """Whether a part is over; raises when it failed."""
        ...

    def release(self, handle: object) -> None:
        """Frees a part's handle."""
        ...

    def drain(self) -> None:
        """Drops what peers sent unasked."""
        ...

    def close(self) -> None:
        """Ends the library's agent."""
        ...


class Flight:
    """One read or write on its way: parts not yet posted, and handles of those that are."""

    def __init__(
        self,
        *,
        operation: str,
        peer: str,
        parts: list[Spans],
        on_over: Callable[[TransferError | None], None],
    ) -> None:
        self.operation = operation
        self.peer = peer
        self.parts = deque(parts)
        self.posted: list[object] = []
        self.error: TransferError | None = None
        self.on_over = on_over
        self._abandoned = False

    def abandon(self) -> None:
        """Nobody waits any more: post no further part. Called from any thread."""
        self._abandoned = True

    @property
    def is_stopping(self) -> bool:
        """Whether no further part will be posted."""
        return self._abandoned or self.error is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing of it can move any more."""
        return not self.posted and (not self.parts or self.is_stopping)


class TransferThread:
    """Runs flights and calls over one backend, made and closed in the thread itself."""

    def __init__(self, make_backend: Callable[[], Backend]) -> None:
        self._make_backend = make_backend
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._flights: list[Flight] = []
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)

    def start(self) -> None:
        """Starts the thread and waits until the backend is made; raises what making it raised."""
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def submit(self, flight: Flight) -> None:
        """Carries a flight; `on_over` follows, once, with None or the error."""
        self._commands.put(lambda: self._flights.append(flight))

    def call(self, function: Callable[[], None]) -> None:
        """Runs a function on the thread, before anything submitted later."""
        self._commands.put(function)

    def close(self, timeout_s: float) -> bool:
        """Ends the thread after closing the backend; False when it is stuck inside the library."""
        self._closed = True
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            backend = self._make_backend()
        except BaseException as error:
            self._error = error
            return
        finally:
            self._started.set()
        idle_polls = 0
        while not self._closed:
            command = self._next(idle_polls)
            if command is not None:
                command()
                idle_polls = 0
            elif not self._flights:
                backend.drain()
            moved = [self._advance(backend, flight) for flight in self._flights]
            self._flights = [flight for flight in self._flights if not self._end(flight)]
            idle_polls = 0 if any(moved) else idle_polls + 1
        self._finish(backend)

    def _next(self, idle_polls: int) -> Callable[[], None] | None:
        """The next command, or None after a wait that grows while nothing moves."""
        if not self._flights:
            wait_s = _IDLE_WAIT_S
        elif idle_polls < _SPINS:
            wait_s = 0.0
        else:
            wait_s = min(_LAST_WAIT_S, _FIRST_WAIT_S * 1.25 ** min(idle_polls - _SPINS, 20))
        try:
            return self._commands.get(block=wait_s > 0, timeout=wait_s or None)
        except queue.Empty:
            return None

    def _advance(self, backend: Backend, flight: Flight) -> bool:
        """Polls what is posted, posts what may be; whether anything changed."""
        moved = False
        for handle in list(flight.posted):
            try:
                done = backend.is_done(flight.peer, handle)
            except TransferError as error:
                flight.error = flight.error or error
                done = True
            if done:
                flight.posted.remove(handle)
                backend.release(handle)
                moved = True
        while flight.parts and not flight.is_stopping and len(flight.posted) < _MAX_POSTED:
            try:
                handle = backend.post(flight.operation, flight.peer, flight.parts[0])
                flight.posted.append(handle)
                flight.parts.popleft()
            except TransferError as error:
                flight.error = error
            moved = True
        return moved

    def _end(self, flight: Flight) -> bool:
        if flight.is_over:
            error = flight.error
            if error is None and flight.parts:
                error = TransferError(flight.peer, "abandoned before all of it was posted")
            flight.on_over(error)
        return flight.is_over

    def _finish(self, backend: Backend) -> None:
        """Closes the backend first: only then are unfinished flights over."""
        peers = [flight.peer for flight in self._flights]
        if peers:
            log.warning(
                "closing with transfers in flight: %d to %s", len(peers), sorted(set(peers))
            )
        for handle in (handle for flight in self._flights for handle in flight.posted):
            backend.release(handle)
        backend.close()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                break
            if command is not None:
                command()
        for flight in self._flights:
            flight.on_over(flight.error or TransferError(flight.peer, "this agent was closed"))
        self._flights = []
