"""What runs in the next step: the prefill and the decode policy over one block pool.

Owns the order of sequences and their growth in blocks. Pure Python without tensors; called on the
loop between steps only. Never runs a step, never frees what is not a sequence's.
"""

from __future__ import annotations

import abc
import bisect
import itertools
from operator import attrgetter
from typing import NamedTuple

from engine.block_pool import BlockPool
from engine.plan import Chunk, FinishReason
from engine.sequence import Sequence, SequenceState, StepItem, finish_reason_for

_ORDER = attrgetter("order")


class Scheduled(NamedTuple):
    """A sequence and its part of a step."""

    sequence: Sequence
    chunk: Chunk


class Scheduler(abc.ABC):
    """A policy: who runs, with how many tokens, and who makes room.

    `max_batch` bounds the sequences of a step, `chunk_tokens` the prompt tokens (or recomputed
    tokens) of a step. Both queues are kept in the sequences' order.
    """

    def __init__(self, *, max_batch: int, chunk_tokens: int) -> None:
        if max_batch < 1 or chunk_tokens < 1:
            raise ValueError(f"max_batch {max_batch}, chunk_tokens {chunk_tokens}: minimum 1")
        self.max_batch = max_batch
        self.chunk_tokens = chunk_tokens
        self.num_preemptions = 0
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._arrivals = itertools.count()

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place or for memory."""
        return len(self._waiting)

    @property
    def sequences(self) -> list[Sequence]:
        """Every live sequence."""
        return [*self._running, *self._waiting]

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence behind those of its priority."""
        sequence.order = (-sequence.priority, next(self._arrivals))
        sequence.rewind()
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a live sequence; its blocks are the caller's to free."""
        queue = self._running if sequence.state is SequenceState.RUNNING else self._waiting
        queue.remove(sequence)

    @abc.abstractmethod
    def validate(self, sequence: Sequence) -> None:
        """Raises ValueError for a sequence that this policy cannot run."""

    @abc.abstractmethod
    def schedule(self, pool: BlockPool) -> list[Scheduled]:
        """Builds the next step, allocating and preempting as needed; empty if nothing can run."""

    @abc.abstractmethod
    def may_preempt(self, pool: BlockPool) -> bool:
        """Whether the next schedule() could take blocks away from a sequence."""

    @abc.abstractmethod
    def ending(
        self, sequence: Sequence, item: StepItem, pool: BlockPool
    ) -> tuple[bool, FinishReason | None]:
        """Whether and why a sequence ends after the step that sampled item's tokens for it."""

    @abc.abstractmethod
    def headroom(self) -> int:
        """Blocks that newcomers should leave free for the sequences already running."""

    def num_spare(self, priority: int, pool: BlockPool) -> int:
        """Blocks that a newcomer of this priority may take now.

        Running sequences keep their headroom, and a waiting sequence that only lacks memory goes
        first. While nothing runs all free blocks are spare, since holding back helps nobody.
        """
        if not self._running:
            return pool.num_free
        if self._waiting and len(self._running) < self.max_batch:
            first = self._waiting[0]
            if first.priority >= priority and self._num_missing(first, pool) > pool.num_free:
                return 0
        return pool.num_free - self.headroom()

    def check(self, pool: BlockPool) -> None:
        """Asserts order, states, progress and that live sequences hold references."""
        for queue, state in (
            (self._running, SequenceState.RUNNING),
            (self._waiting, SequenceState.WAITING),
        ):
            assert queue == sorted(queue, key=_ORDER), f"{state.value} out of order"
            for sequence in queue:
                assert sequence.state is state, f"{sequence} is in the wrong queue"
                sequence.check(pool.block_tokens)
                for block in sequence.blocks:
                    assert pool.num_refs(block) > 0, f"{sequence}: block {block} has no reference"
        assert len(self._running) <= self.max_batch, "too many sequences run"

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        bisect.insort(self._waiting, sequence, key=_ORDER)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        bisect.insort(self._running, sequence, key=_ORDER)

    def _num_missing(self, sequence: Sequence, pool: BlockPool) -> int:
        return pool.num_blocks_for(sequence.num_tokens) - len(sequence.blocks)

    def _complete_blocks(self, sequence: Sequence, pool: BlockPool) -> bool:
        """Gives a sequence blocks for all its tokens, or none if they are not all there."""
        missing = self._num_missing(sequence, pool)
        if missing > pool.num_free:
            return False
        if missing > 0:
            sequence.blocks.extend(pool.allocate(missing))
        return True

    def _strip(self, sequence: Sequence, pool: BlockPool) -> None:
        """Takes a sequence's blocks; it computes everything again."""
        pool.free(sequence.blocks)
        sequence.blocks = []
        assert sequence.num_in_flight == 0, f"{sequence} gives blocks up while a step uses them"
        sequence.num_computed = 0
        sequence.rewind()
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _make_room(self, num_blocks: int, sequence: Sequence, pool: BlockPool) -> bool:
        """Strips the last holders behind `sequence` until num_blocks are free."""
        while pool.num_free < num_blocks:
            victim = self._last_holder()
            if victim is None or victim.order <= sequence.order:
                return False
            self._strip(victim, pool)
            if victim.state is SequenceState.RUNNING:
                self._running.remove(victim)
                self._wait(victim)
        return True

    def _last_holder(self) -> Sequence | None:
        waiting = next((s for s in reversed(self._waiting) if s.blocks), None)
        running = next((s for s in reversed(self._running) if s.blocks), None)
        return max(filter(None, (waiting, running)), key=_ORDER, default=None)


class PrefillScheduler(Scheduler):
    """Prompts in chunks, by priority then arrival, within one token budget per step.

    A prompt starts only with blocks for all of it, so nothing that runs ever needs more.
    """

    def validate(self, sequence: Sequence) -> None:
        """Every sequence that fits the pool can be prefilled."""

    def may_preempt(self, pool: BlockPool) -> bool:
        """Only waiting prompts can lose blocks, and only while nothing runs."""
        return not self._running

    def headroom(self) -> int:
        """Running prompts hold all their blocks."""
        return 0

    def ending(
        self, sequence: Sequence, item: StepItem, pool: BlockPool
    ) -> tuple[bool, FinishReason | None]:
        """A prompt ends once sampled; the reason is known for a single seed."""
        if len(item.token_ids) != 1:
            return True, None
        num_outputs = len(sequence.output_token_ids)
        return True, finish_reason_for(item.token_ids[0], num_outputs, sequence.stopping)

    def schedule(self, pool: BlockPool) -> list[Scheduled]:
        """Admits what has memory, then deals the budget out in order."""
        while self._waiting and len(self._running) < self.max_batch:
            first = self._waiting[0]
            if not self._running:
                self._make_room(self._num_missing(first, pool), first, pool)
            if not self._complete_blocks(first, pool):
                break
            self._run(self._waiting.pop(0))
        step: list[Scheduled] = []
        budget = self.chunk_tokens
        for sequence in self._running:
            if budget == 0:
                break
            if sequence.num_pending:
                continue
            num_tokens = min(sequence.num_remaining, budget)
            budget -= num_tokens
            chunk = sequence.chunk(num_tokens, pool.block_tokens, len(step))
            step.append(Scheduled(sequence, chunk))
        return step


class DecodeScheduler(Scheduler):
    """One token per running sequence and step; missing KV is recomputed within a token budget.

    When blocks run out the last sequence in order gives its blocks up and waits.
    """

    def validate(self, sequence: Sequence) -> None:
        """One seed, no prompt log probabilities."""
        if len(sequence.seeds) != 1:
            raise ValueError(f"seeds: {len(sequence.seeds)}; decoding takes exactly 1")
        if sequence.num_prompt_logprobs is not None:
            raise ValueError("num_prompt_logprobs: decoding gives none")

    def may_preempt(self, pool: BlockPool) -> bool:
        """Every running sequence may need a block, a recomputing one many."""
        missing = sum(max(0, self._num_missing(sequence, pool)) for sequence in self._running)
        return not self._running or missing > pool.num_free

    def headroom(self) -> int:
        """Each running sequence may soon need one more block."""
        return len(self._running)

    def ending(
        self, sequence: Sequence, item: StepItem, pool: BlockPool
    ) -> tuple[bool, FinishReason | None]:
        """As its stopping parameters say, or LENGTH when the whole pool could not hold more."""
        num_outputs = len(sequence.output_token_ids)
        reason = finish_reason_for(item.token_ids[0], num_outputs, sequence.stopping)
        if reason is None and len(sequence.token_ids) > pool.num_blocks * pool.block_tokens:
            reason = FinishReason.LENGTH
        return reason is not None, reason

    def schedule(self, pool: BlockPool) -> list[Scheduled]:
        """Running sequences first, in order; then waiting ones while there is room."""
        step: list[Scheduled] = []
        budget, block_tokens = self.chunk_tokens, pool.block_tokens
        capacity = pool.num_blocks * block_tokens
        preempted, index = self.num_preemptions, 0
        while index < len(self._running):
            sequence = self._running[index]
            num_tokens = sequence.num_remaining
            if num_tokens > 1:
                num_tokens = min(num_tokens, budget)
                budget -= num_tokens
            index += 1
            if num_tokens == 0 or sequence.will_end(capacity):
                continue
            missing = sequence.num_scheduled + num_tokens > len(sequence.blocks) * block_tokens
            if missing and not self._grow(sequence, num_tokens, pool):
                break
            step.append(Scheduled(sequence, sequence.chunk(num_tokens, block_tokens, len(step))))
        if self.num_preemptions == preempted:
            self._admit(step, budget, pool)
        return step

    def _grow(self, sequence: Sequence, num_tokens: int, pool: BlockPool) -> bool:
        """Extends a running sequence's blocks; if even others' blocks do not do, it steps back."""
        needed = pool.num_blocks_for(sequence.num_scheduled + num_tokens) - len(sequence.blocks)
        if self._make_room(needed, sequence, pool):
            sequence.blocks.extend(pool.allocate(needed))
            return True
        self._strip(sequence, pool)
        self._running.remove(sequence)
        self._wait(sequence)
        return False

    def _admit(self, step: list[Scheduled], budget: int, pool: BlockPool) -> None:
        while self._waiting and len(self._running) < self.max_batch:
            first = self._waiting[0]
            if not self._running:
                self._make_room(self._num_missing(first, pool), first, pool)
            num_tokens = first.num_remaining
            if num_tokens > 1:
                num_tokens = min(num_tokens, budget)
            if num_tokens == 0 or not self._complete_blocks(first, pool):
                return
            if first.num_remaining > 1:
                budget -= num_tokens
            self._run(self._waiting.pop(0))
            chunk = first.chunk(num_tokens, pool.block_tokens, len(step))
            step.append(Scheduled(first, chunk))
