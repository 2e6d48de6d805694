"""Steps in the air: one engine thread launches them, another waits for what is not done at once.

Owns the threads and the order of steps. Never schedules, never touches a sequence.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from engine.plan import Chunk, ChunkResult, Step
from engine.scheduler import Scheduled

T = TypeVar("T")

MAX_FLIGHTS = 2
"""Steps launched and not landed: the one that computes and the one behind it."""


class BlockCache(Protocol):
    """The part of the KV cache that the engine uses."""

    def copy_blocks(self, src: list[int], dst: list[int], /) -> None:
        """Copies whole blocks."""


class Runner(Protocol):
    """What computes steps."""

    @property
    def cache(self) -> BlockCache:
        """The KV cache that the blocks are in."""
        ...

    def launch(self, chunks: list[Chunk], previous: Step | None, /) -> Step:
        """Starts a step behind `previous`, in the engine thread; may return before it is done.

        Tokens that chunks leave open are those that `previous` samples.
        """
        ...

    def results(self, step: Step, /) -> list[ChunkResult]:
        """One result per chunk, in order; blocks until the step is done."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A step that the engine thread has or will have. schedule_s: seconds it took to plan."""

    batch: list[Scheduled]
    launched: concurrent.futures.Future[Step]
    schedule_s: float
    launched_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """A flight that is over. gap_s: seconds from the step before, or its launch, to its start.

    done_at: when its results were there, on the monotonic clock.
    """

    flight: Flight
    step: Step
    results: list[ChunkResult]
    gap_s: float
    done_at: float


class Pipeline:
    """Flights of one runner, landed in the order of their launch.

    on_written, if set, is called on the loop when the KV of a flight that is not over is in the
    cache.
    """

    def __init__(self, runner: Runner) -> None:
        self.flights: deque[Flight] = deque()
        self._runner = runner
        self._launches = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._waits = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine-wait")
        self._last_done_at = 0.0
        self.on_written: Callable[[Flight], None] | None = None

    def launch(self, batch: list[Scheduled], schedule_s: float) -> None:
        """Queues a step behind those in flight."""
        previous = self.flights[-1].launched if self.flights else None
        chunks = [scheduled.chunk for scheduled in batch]
        launched = self._launches.submit(_launch, self._runner, chunks, previous)
        self.flights.append(Flight(batch=batch, launched=launched, schedule_s=schedule_s))

    async def land(self) -> Landed:
        """Waits for the oldest flight and takes it out; one that raised stays in `flights`."""
        flight = self.flights[0]
        step = await outcome(flight.launched)
        if step.is_done:
            results, done_at = _results(self._runner, step)
        else:
            waited = self._waits.submit(self._wait, flight, step, asyncio.get_running_loop())
            results, done_at = await outcome(waited)
        if len(results) != len(flight.batch):
            raise RuntimeError(f"{len(results)} results for {len(flight.batch)} chunks")
        started_at = max(self._last_done_at, flight.launched_at)
        self._last_done_at = done_at
        gap_s = max(0.0, done_at - started_at - step.forward_s - step.sample_s)
        self.flights.popleft()
        return Landed(flight=flight, step=step, results=results, gap_s=gap_s, done_at=done_at)

    async def wait(self) -> None:
        """Waits until no flight computes any more, whatever came of them."""
        for flight in self.flights:
            with contextlib.suppress(Exception):
                step = await outcome(flight.launched)
                await outcome(self._waits.submit(self._runner.results, step))

    async def call(self, fn: Callable[..., T], *args: object) -> T:
        """Runs fn(*args) in the engine thread, behind what is launched."""
        return await outcome(self._launches.submit(fn, *args))

    def _wait(
        self, flight: Flight, step: Step, loop: asyncio.AbstractEventLoop
    ) -> tuple[list[ChunkResult], float]:
        if self.on_written is not None and step.wait_written():
            loop.call_soon_threadsafe(self.on_written, flight)
        return _results(self._runner, step)

    def close(self) -> None:
        """Ends the threads; blocks until they have."""
        self._launches.shutdown()
        self._waits.shutdown()


def _launch(
    runner: Runner, chunks: list[Chunk], previous: concurrent.futures.Future[Step] | None
) -> Step:
    return runner.launch(chunks, previous.result() if previous is not None else None)


def _results(runner: Runner, step: Step) -> tuple[list[ChunkResult], float]:
    """The results and when they were there: the loop may see them late."""
    return runner.results(step), time.monotonic()


async def outcome(future: concurrent.futures.Future[T]) -> T:
    """A thread future's result. When cancelled it first waits until the thread has let go."""
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([asyncio.wrap_future(future)])
            except asyncio.CancelledError:  # raised again below, once memory is safe
                continue
        raise
