"""The step loop: one engine thread for tensor work, all scheduling state on the event loop.

Owns the life of sequences between add() and their end, and their blocks. Never touches tensors
itself, never knows requests or the network.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from engine.block_pool import BlockPool, BlockWaiters
from engine.plan import Chunk, ChunkResult
from engine.scheduler import Scheduled, Scheduler
from engine.sequence import Sequence, SequenceState, StepItem, StepOutcome

__all__ = ["BlockCache", "Engine", "EngineClosedError", "Runner", "StepItem", "StepOutcome"]

log = logging.getLogger("kvmesh.engine")

T = TypeVar("T")


class BlockCache(Protocol):
    """The part of the KV cache that the engine uses."""

    def copy_blocks(self, src: list[int], dst: list[int], /) -> None:
        """Copies whole blocks."""


class Runner(Protocol):
    """What computes steps, in the engine thread; one result per chunk, in order."""

    @property
    def cache(self) -> BlockCache:
        """The KV cache that the blocks are in."""
        ...

    def step(self, chunks: list[Chunk], /) -> list[ChunkResult]:
        """Computes all chunks."""
        ...


class EngineClosedError(RuntimeError):
    """The engine was closed before this could happen."""


class Engine:
    """Runs sequences over one runner and one block pool until closed.

    on_step is called on the loop after each step; on_failure(sequences, error) when a step raised:
    its sequences are over, their blocks freed, and the engine goes on. An exception of a callback
    ends run().
    """

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        scheduler: Scheduler,
        on_step: Callable[[StepOutcome], None],
        on_failure: Callable[[list[Sequence], BaseException], None] | None = None,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._scheduler = scheduler
        self._on_step = on_step
        self._on_failure = on_failure
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._waiters = BlockWaiters(pool)
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self._is_closed = False
        self._in_step: set[Sequence] = set()
        self._num_steps = 0
        self._flight: _Flight | None = None

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place or memory, and callers that wait for blocks."""
        return self._scheduler.num_waiting + len(self._waiters)

    @property
    def num_steps(self) -> int:
        """Steps finished since the start, failed ones included."""
        return self._num_steps

    def add(self, sequence: Sequence) -> None:
        """Takes a NEW sequence and its blocks. Raises ValueError for one that can never run."""
        if self._is_closed:
            raise EngineClosedError("add: the engine is closed")
        if sequence.state is not SequenceState.NEW:
            raise ValueError(f"sequence {sequence.key!r} is {sequence.state.value}; expected new")
        pool, num_tokens = self._pool, len(sequence.token_ids)
        num_blocks = pool.num_blocks_for(num_tokens)
        if num_blocks > pool.num_blocks:
            raise ValueError(
                f"sequence {sequence.key!r}: {num_tokens} tokens need {num_blocks} blocks of "
                f"{pool.block_tokens} tokens; the pool has {pool.num_blocks}"
            )
        self._scheduler.validate(sequence)
        sequence.check(pool.block_tokens)
        self._scheduler.add(sequence)
        self._wake.set()

    def drop(self, sequence: Sequence) -> None:
        """Ends a sequence without outcome; its blocks are free at once or after the running step.

        Does nothing for one that was never added or is over already.
        """
        if sequence.state not in (SequenceState.WAITING, SequenceState.RUNNING):
            return
        self._scheduler.remove(sequence)
        sequence.state = SequenceState.DROPPED
        if sequence not in self._in_step:
            self._free(sequence)
            self.wake()

    def wake(self) -> None:
        """Looks again for memory: call after freeing blocks in the pool directly."""
        self._wake.set()
        # A sequence that waits goes before newcomers: while idle only the loop knows if it fits.
        if self._in_step or not self._scheduler.num_waiting:
            self._serve_waiters()

    async def allocate(self, num_blocks: int, priority: float = 0) -> list[int]:
        """Waits for num_blocks blocks; the caller frees them or gives them to a sequence.

        Higher priority first, then first come first served. Raises ValueError for more blocks than
        the pool has, EngineClosedError.
        """
        if self._is_closed:
            raise EngineClosedError("allocate: the engine is closed")
        if not 0 <= num_blocks <= self._pool.num_blocks:
            raise ValueError(
                f"num_blocks {num_blocks}: the pool has {self._pool.num_blocks} blocks"
            )
        if num_blocks == 0:
            return []
        wish = self._waiters.push(num_blocks, priority)
        self.wake()
        try:
            return await wish
        except asyncio.CancelledError:
            self._waiters.withdraw(wish)
            self.wake()
            raise

    async def call(self, fn: Callable[..., T], *args: object) -> T:
        """Runs fn(*args) in the engine thread between steps; when cancelled, still waits for it."""
        return await _outcome(self._executor.submit(fn, *args))

    async def fork(self, blocks: list[int], num_tokens: int) -> list[int]:
        """Blocks with the same first num_tokens tokens: full ones shared, the tail block copied."""
        num_full, num_tail = divmod(num_tokens, self._pool.block_tokens)
        if num_full + bool(num_tail) > len(blocks):
            raise ValueError(f"blocks: {len(blocks)} blocks hold fewer than {num_tokens} tokens")
        source = blocks[: num_full + bool(num_tail)]
        forked, tail = source[:num_full], source[num_full:]
        self._pool.share(source)
        try:
            if tail:
                # Ahead of every newcomer: whoever forks holds memory already.
                forked += await self.allocate(1, math.inf)
                await self.call(self._runner.cache.copy_blocks, tail, forked[num_full:])
        except BaseException:
            self._pool.free(forked)
            raise
        finally:
            self._pool.free(tail)
            self.wake()
        return forked

    async def run(self) -> None:
        """The step loop; returns after close()."""
        self._ended.clear()
        try:
            while not self._is_closed:
                if self._flight is None:
                    self._wake.clear()
                    self._launch()
                if self._flight is None:
                    await self._wake.wait()
                else:
                    await self._land(self._flight)
        finally:
            if self._flight is not None:
                await asyncio.wait([asyncio.wrap_future(self._flight.future)])
            self._end()
            self._ended.set()

    async def close(self) -> None:
        """Ends the loop after the running step, drops every sequence and refuses waiters."""
        self._is_closed = True
        self._wake.set()
        await self._ended.wait()
        self._end()
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)

    def check(self) -> None:
        """Asserts the books: pool, queues, progress, and blocks of the running step."""
        self._pool.check()
        self._scheduler.check(self._pool)
        for sequence in self._in_step:
            for block in sequence.blocks:
                assert self._pool.num_refs(block) > 0, f"{sequence}: block {block} freed too early"

    def _serve_waiters(self) -> None:
        self._waiters.serve(lambda priority: self._scheduler.num_spare(priority, self._pool))

    def _launch(self) -> None:
        """Schedules and submits the next step, if anything can run."""
        batch = self._scheduler.schedule(self._pool)
        self._serve_waiters()
        if batch:
            self._in_step = {scheduled.sequence for scheduled in batch}
            chunks = [scheduled.chunk for scheduled in batch]
            future = self._executor.submit(_timed, self._runner, chunks)
            self._flight = _Flight(batch=batch, future=future)

    async def _land(self, flight: _Flight) -> None:
        """Waits for a step, books it and reports it; the next one may be under way by then."""
        try:
            results, duration_s = await _outcome(flight.future)
        except Exception as error:
            self._flight = None
            self._fail(flight.batch, error)
            return
        self._flight = None
        self._num_steps += 1
        items = self._book(flight.batch, results)
        # The next step computes while this one's tokens go out, unless scheduling it could take
        # blocks which the callback still reads.
        if not self._is_closed and not self._scheduler.may_preempt(self._pool):
            self._launch()
        self._on_step(StepOutcome(step=self._num_steps, duration_s=duration_s, items=items))
        for item in items:
            if item.is_finished and not item.keep_blocks:
                self._free(item.sequence)
        self.wake()

    def _book(self, batch: list[Scheduled], results: list[ChunkResult]) -> list[StepItem]:
        """Takes the results into the sequences; finished ones leave the scheduler."""
        self._in_step = set()
        items: list[StepItem] = []
        for (sequence, chunk), result in zip(batch, results, strict=True):
            if sequence.state is SequenceState.DROPPED:
                self._free(sequence)
                continue
            item = sequence.advance(chunk, result)
            items.append(item)
            if result.token_ids:
                item.is_finished, reason = self._scheduler.ending(sequence, item, self._pool)
                if item.is_finished:
                    self._scheduler.remove(sequence)
                    sequence.state = SequenceState.FINISHED
                    sequence.finish_reason = item.finish_reason = reason
        return items

    def _fail(self, batch: list[Scheduled], error: Exception) -> None:
        """Ends every sequence of a step that raised."""
        log.error("step %d failed", self._num_steps + 1, exc_info=error)
        self._num_steps += 1
        self._in_step = set()
        failed: list[Sequence] = []
        for sequence, _ in batch:
            if sequence.state is not SequenceState.DROPPED:
                self._scheduler.remove(sequence)
                sequence.state = SequenceState.FAILED
                failed.append(sequence)
            self._free(sequence)
        if self._on_failure is not None and failed:
            self._on_failure(failed, error)
        self.wake()

    def _free(self, sequence: Sequence) -> None:
        self._pool.free(sequence.blocks)
        sequence.blocks = []

    def _end(self) -> None:
        """Drops what is left; no step runs any more."""
        self._waiters.refuse_all(EngineClosedError("allocate: the engine was closed"))
        for sequence in [s for s in self._in_step if s.state is SequenceState.DROPPED]:
            self._free(sequence)
        self._in_step = set()
        for sequence in self._scheduler.sequences:
            self.drop(sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """A step that the engine thread has or will have."""

    batch: list[Scheduled]
    future: concurrent.futures.Future[tuple[list[ChunkResult], float]]


def _timed(runner: Runner, chunks: list[Chunk]) -> tuple[list[ChunkResult], float]:
    started_at = time.perf_counter()
    results = runner.step(chunks)
    duration_s = time.perf_counter() - started_at
    if len(results) != len(chunks):
        raise RuntimeError(f"runner answered {len(results)} results for {len(chunks)} chunks")
    return results, duration_s


async def _outcome(future: concurrent.futures.Future[T]) -> T:
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
