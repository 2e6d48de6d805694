"""The step loop: one engine thread for tensor work, all scheduling state on the event loop.

Owns the life of sequences between add() and their end, and their blocks. Never touches tensors
itself, never knows requests or the network. While a step computes the next one is scheduled and
launched behind it, so the thread and the device never wait for the loop: a sequence that ends is
computed once more in vain.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from engine.block_pool import BlockPool, BlockWaiters
from engine.pipeline import MAX_FLIGHTS, Flight, Landed, Pipeline, Runner
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceState, StepItem, StepOutcome

log = logging.getLogger("kvmesh.engine")

T = TypeVar("T")


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
        self._pipeline = Pipeline(runner)
        self._waiters = BlockWaiters(pool)
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self._is_closed = False
        self._num_steps = 0
        self._last_emit_s = 0.0

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place or memory, and callers that wait for blocks."""
        return self._scheduler.num_waiting + len(self._waiters)

    @property
    def num_preemptions(self) -> int:
        """Times that a sequence lost its blocks to others."""
        return self._scheduler.num_preemptions

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

    def tell_written(self, listener: Callable[[Sequence, int], None]) -> None:
        """From now on listener(sequence, n) is called, before on_step, when the KV of its first n
        tokens is in its blocks: only for steps that take long, and the step may still fail.
        """

        def tell(flight: Flight) -> None:
            for sequence, chunk in flight.batch:
                if sequence.state is SequenceState.RUNNING:
                    listener(sequence, chunk.start + len(chunk.token_ids))

        self._pipeline.on_written = tell

    def drop(self, sequence: Sequence) -> None:
        """Ends a sequence without outcome; its blocks are free once no step uses them.

        Does nothing for one that was never added or is over already.
        """
        if sequence.state not in (SequenceState.WAITING, SequenceState.RUNNING):
            return
        self._scheduler.remove(sequence)
        sequence.state = SequenceState.DROPPED
        if not sequence.num_in_flight:
            self._free(sequence)
            self.wake()

    def wake(self) -> None:
        """Looks again for memory: call after freeing blocks in the pool directly."""
        self._wake.set()
        # A sequence that waits goes before newcomers: while idle only the loop knows if it fits.
        if self._pipeline.flights or not self._scheduler.num_waiting:
            self._serve_waiters()

    async def allocate(self, num_blocks: int, priority: int = 0) -> list[int]:
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

    def allocate_now(self, num_blocks: int, priority: int = 0) -> list[int] | None:
        """num_blocks blocks if a newcomer may take them this moment and nobody waits, else None."""
        spare = self._scheduler.num_spare(priority, self._pool)
        if self._is_closed or self.num_waiting or num_blocks > spare:
            return None
        return self._pool.allocate(num_blocks)

    async def call(self, fn: Callable[..., T], *args: object) -> T:
        """Runs fn(*args) in the engine thread between steps; when cancelled, still waits for it."""
        return await self._pipeline.call(fn, *args)

    async def fork(self, blocks: list[int], num_tokens: int) -> tuple[list[int], int]:
        """Blocks with the same first tokens, and how many: full ones shared, the tail copied.

        Without a free block the tail is left out: whoever forks holds memory, and two that waited
        for more could block each other for ever.
        """
        num_full, num_tail = divmod(num_tokens, self._pool.block_tokens)
        if num_full + bool(num_tail) > len(blocks):
            raise ValueError(f"blocks: {len(blocks)} blocks hold fewer than {num_tokens} tokens")
        if not num_tail or not self._pool.num_free:
            self._pool.share(blocks[:num_full])
            return blocks[:num_full], num_tokens - num_tail
        source = blocks[: num_full + 1]
        self._pool.share(source)
        forked = [*source[:num_full], *self._pool.allocate(1)]
        try:
            await self.call(self._runner.cache.copy_blocks, source[num_full:], forked[num_full:])
        except BaseException:
            self._pool.free(forked)
            raise
        finally:
            self._pool.free(source[num_full:])
            self.wake()
        return forked, num_tokens

    async def run(self) -> None:
        """The step loop; returns after close()."""
        self._ended.clear()
        try:
            while not self._is_closed:
                self._wake.clear()
                self._fill()
                if self._pipeline.flights:
                    await self._land()
                else:
                    await self._wake.wait()
        finally:
            await self._abandon()
            self._end()
            self._ended.set()

    async def close(self) -> None:
        """Ends the loop after the steps in flight, drops every sequence and refuses waiters."""
        self._is_closed = True
        self._wake.set()
        await self._ended.wait()
        self._end()
        await asyncio.get_running_loop().run_in_executor(None, self._pipeline.close)

    def check(self) -> None:
        """Asserts the books: pool, queues, progress, and blocks of the steps in flight."""
        self._pool.check()
        self._scheduler.check(self._pool)
        in_flight = Counter(s.sequence for flight in self._pipeline.flights for s in flight.batch)
        for sequence, num_flights in in_flight.items():
            assert sequence.num_in_flight == num_flights, f"{sequence}: flights"
            for block in sequence.blocks:
                assert self._pool.num_refs(block) > 0, f"{sequence}: block {block} freed too early"
        for sequence in self._scheduler.sequences:
            assert sequence in in_flight or not sequence.num_in_flight, f"{sequence}: flights"

    def _serve_waiters(self) -> None:
        self._waiters.serve(lambda priority: self._scheduler.num_spare(priority, self._pool))

    def _fill(self) -> None:
        """Launches what can run, one step ahead of the one that computes.

        Not ahead when scheduling could take blocks away, which a step in flight may write.
        """
        while not self._is_closed and len(self._pipeline.flights) < MAX_FLIGHTS:
            if self._pipeline.flights and self._scheduler.may_preempt(self._pool):
                return
            started_at = time.perf_counter()
            batch = self._scheduler.schedule(self._pool)
            schedule_s = time.perf_counter() - started_at
            self._serve_waiters()
            if not batch:
                return
            self._pipeline.launch(batch, schedule_s)

    async def _land(self) -> None:
        """Waits for the oldest step, books it and reports it; others compute meanwhile."""
        try:
            landed = await self._pipeline.land()
        except Exception as error:
            await self._fail(error)
            return
        outcome = self._book(landed)
        # While the callback reads blocks none are taken away: see _fill.
        if not self._scheduler.may_preempt(self._pool):
            self._fill()
        started_at = time.perf_counter()
        self._on_step(outcome)
        self._last_emit_s = time.perf_counter() - started_at
        for item in outcome.items:
            if item.is_finished and not item.keep_blocks:
                self._release(item.sequence)
        self.wake()

    def _book(self, landed: Landed) -> StepOutcome:
        """Takes the results into the sequences; finished ones leave the scheduler."""
        flight, step = landed.flight, landed.step
        self._num_steps += 1
        items: list[StepItem] = []
        num_cancelled = num_discarded = 0
        for (sequence, chunk), result in zip(flight.batch, landed.results, strict=True):
            if sequence.state is not SequenceState.RUNNING:
                sequence.num_in_flight -= 1
                if sequence.state is SequenceState.FINISHED:
                    num_discarded += len(result.token_ids)
                else:
                    num_cancelled += len(result.token_ids)
                self._release(sequence)
                continue
            item = sequence.advance(chunk, result)
            items.append(item)
            if result.token_ids:
                item.is_finished, reason = self._scheduler.ending(sequence, item, self._pool)
                if item.is_finished:
                    self._scheduler.remove(sequence)
                    sequence.state = SequenceState.FINISHED
                    sequence.finish_reason = item.finish_reason = reason
        return StepOutcome(
            step=self._num_steps,
            schedule_s=flight.schedule_s,
            forward_s=step.forward_s,
            sample_s=step.sample_s,
            gap_s=landed.gap_s,
            emit_s=self._last_emit_s,
            num_cancelled=num_cancelled,
            num_discarded=num_discarded,
            graph_rows=step.graph_rows,
            done_at=landed.done_at,
            items=items,
        )

    async def _fail(self, error: Exception) -> None:
        """Ends every sequence of the oldest step, which raised; the one behind it runs again."""
        log.error("step %d failed", self._num_steps + 1, exc_info=error)
        self._num_steps += 1
        batch = self._pipeline.flights[0].batch
        await self._abandon()
        failed: list[Sequence] = []
        for sequence, _ in batch:
            if sequence.state is SequenceState.RUNNING:
                self._scheduler.remove(sequence)
                sequence.state = SequenceState.FAILED
                failed.append(sequence)
            self._release(sequence)
        if self._on_failure is not None and failed:
            self._on_failure(failed, error)
        self.wake()

    async def _abandon(self) -> None:
        """Waits for all steps in flight and takes nothing from them."""
        await self._pipeline.wait()
        while self._pipeline.flights:
            for sequence, _ in self._pipeline.flights.popleft().batch:
                sequence.num_in_flight -= 1
                if sequence.state is SequenceState.RUNNING:
                    sequence.rewind()
                else:
                    self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Frees a sequence's blocks unless a step in flight still uses them."""
        if not sequence.num_in_flight:
            self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._pool.free(sequence.blocks)
        sequence.blocks = []

    def _end(self) -> None:
        """Drops what is left; no step runs any more."""
        self._waiters.refuse_all(EngineClosedError("allocate: the engine was closed"))
        for sequence in self._scheduler.sequences:
            self.drop(sequence)
