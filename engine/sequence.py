"""One sequence on an engine: its tokens, its blocks, how far its KV is computed, when it ends.

Owns that progress and the building of chunks. Never allocates, never decides what runs.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.plan import (
    UNKNOWN_TOKEN,
    Chunk,
    ChunkResult,
    FinishReason,
    PositionLogprobs,
    SampleRequest,
    SamplingParams,
    StoppingParams,
)

_NONE_BARRED: frozenset[int] = frozenset()


class SequenceState(enum.Enum):
    """Where a sequence is in its life; after NEW its blocks are the engine's to free."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    DROPPED = "dropped"
    FAILED = "failed"


def finish_reason_for(
    token_id: int, num_output_tokens: int, stopping: StoppingParams
) -> FinishReason | None:
    """Why a sequence ends with token_id as its num_output_tokens-th output (from 1), or None.

    EOS and stop tokens count only after min_new_tokens outputs; EOS comes before a stop token,
    and both before LENGTH.
    """
    if num_output_tokens > stopping.min_new_tokens:
        if token_id in stopping.eos_token_ids:
            return FinishReason.EOS
        if token_id in stopping.stop_token_ids:
            return FinishReason.STOP_TOKEN
    if num_output_tokens >= stopping.max_new_tokens:
        return FinishReason.LENGTH
    return None


class Sequence:
    """A prompt and its outputs. With several seeds it ends after one token per seed (prefill).

    KV exists for token_ids[:num_computed]; the last token is never among them before a step, so
    that a step always has logits to sample from. Steps in flight bring it to num_scheduled and
    sample num_pending more tokens. Blocks cover at least num_scheduled tokens.
    `order` ranks sequences: smaller goes first (higher priority, then earlier arrival).
    """

    __slots__ = (
        "_barred",
        "_place",
        "blocks",
        "finish_reason",
        "key",
        "num_computed",
        "num_in_flight",
        "num_logprobs",
        "num_pending",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_scheduled",
        "order",
        "output_token_ids",
        "priority",
        "prompt_token_ids",
        "sampling",
        "seeds",
        "state",
        "stopping",
        "token_ids",
    )

    def __init__(
        self,
        key: Any,
        prompt_token_ids: list[int],
        seeds: tuple[int, ...],
        sampling: SamplingParams,
        stopping: StoppingParams,
        num_logprobs: int | None = None,
        num_prompt_logprobs: int | None = None,
        priority: int = 0,
        output_token_ids: Iterable[int] = (),
    ) -> None:
        if not prompt_token_ids:
            raise ValueError("prompt_token_ids is empty; at least one token is needed")
        if not seeds:
            raise ValueError("seeds is empty; at least one is needed")
        self.key = key
        self.prompt_token_ids = list(prompt_token_ids)
        self.output_token_ids = list(output_token_ids)
        self.token_ids = self.prompt_token_ids + self.output_token_ids
        self.seeds = seeds
        self.sampling = sampling
        self.stopping = stopping
        self.num_logprobs = num_logprobs
        self.num_prompt_logprobs = num_prompt_logprobs
        self.priority = priority
        self.order: tuple[int, int] = (-priority, 0)
        self.blocks: list[int] = []
        self.num_computed = 0
        self.num_scheduled = 0
        self.num_pending = 0
        self.num_in_flight = 0
        self.num_preemptions = 0
        self.state = SequenceState.NEW
        self.finish_reason: FinishReason | None = None
        self._place = 0  # number of the chunk that samples the pending token
        self._barred = stopping.eos_token_ids | stopping.stop_token_ids

    def __repr__(self) -> str:
        return (
            f"Sequence({self.key!r}, {self.state.value}, {self.num_computed} of "
            f"{len(self.token_ids)} tokens computed, {len(self.blocks)} blocks)"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens there will be when the steps in flight have landed."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV no step computes yet: at least 1."""
        return self.num_tokens - self.num_scheduled

    def will_end(self, capacity: int) -> bool:
        """Whether the token in flight is the last by length; capacity: tokens memory can hold."""
        num_outputs = len(self.output_token_ids) + self.num_pending
        is_full = num_outputs >= self.stopping.max_new_tokens or self.num_tokens > capacity
        return bool(self.num_pending) and is_full

    def rewind(self) -> None:
        """Forgets steps in flight: what they were to compute is scheduled again."""
        self.num_scheduled = self.num_computed
        self.num_pending = 0

    def chunk(self, num_tokens: int, block_tokens: int, place: int) -> Chunk:
        """Schedules the next num_tokens tokens as chunk number `place` of a step.

        Samples if they reach the end. The sequence's blocks must cover them.
        """
        tokens, start = self.token_ids, self.num_scheduled
        end = start + num_tokens
        num_blocks = -(-end // block_tokens)
        assert start < end <= self.num_tokens, f"{self} cannot compute {num_tokens} tokens"
        assert num_blocks <= len(self.blocks), f"{self} has too few blocks for {end} tokens"
        blocks = self.blocks
        if num_blocks < len(blocks):
            blocks = blocks[:num_blocks]
        follows = self._place if self.num_pending else None
        sample = self._sample() if end == self.num_tokens else None
        self.num_scheduled = end
        self.num_in_flight += 1
        if sample is not None:
            self.num_pending, self._place = 1, place
        if follows is not None:
            assert num_tokens == 1 == end - len(tokens), f"{self}: an unknown token stands alone"
        following: list[int] = []
        if self.num_prompt_logprobs is not None:
            following = self.prompt_token_ids[start + 1 : end + 1]
        return Chunk(
            token_ids=tokens[start:end] if follows is None else [UNKNOWN_TOKEN],
            start=start,
            blocks=blocks,
            sample=sample,
            prompt_logprobs=self.num_prompt_logprobs if following else None,
            next_token_ids=following,
            follows=follows,
            prompt_len=len(self.prompt_token_ids),
        )

    def advance(self, chunk: Chunk, result: ChunkResult) -> StepItem:
        """Books a step: the chunk is computed; a single sampled token is appended."""
        before = self.num_computed
        token_ids = result.token_ids
        num_tokens = len(chunk.token_ids)
        assert before == chunk.start, f"{self}: a chunk that starts at {chunk.start} landed"
        self.num_in_flight -= 1
        self.num_computed = before + num_tokens
        if chunk.sample is not None:
            self.num_pending = 0 if self.num_scheduled == self.num_computed else 1
        if len(token_ids) == 1:
            self.output_token_ids.append(token_ids[0])
            self.token_ids.append(token_ids[0])
        return StepItem(
            sequence=self,
            num_computed_before=before,
            num_computed_after=before + num_tokens,
            num_tokens=num_tokens,
            token_ids=token_ids,
            logprobs=result.logprobs,
            prompt_logprobs=result.prompt_logprobs,
        )

    def check(self, block_tokens: int) -> None:
        """Asserts the progress invariants."""
        assert self.token_ids == self.prompt_token_ids + self.output_token_ids, f"{self}: tokens"
        assert 0 <= self.num_computed < len(self.token_ids), f"{self}: nothing left to compute"
        if self.state is not SequenceState.NEW:
            assert self.num_computed <= self.num_scheduled <= self.num_tokens, f"{self}: schedule"
        assert self.num_scheduled <= len(self.blocks) * block_tokens, f"{self}: blocks too few"
        assert len(set(self.blocks)) == len(self.blocks), f"{self}: a block twice"

    def _sample(self) -> SampleRequest:
        num_outputs = len(self.output_token_ids) + self.num_pending
        below_minimum = num_outputs < self.stopping.min_new_tokens
        return SampleRequest(
            params=self.sampling,
            seeds=self.seeds,
            position=self.num_tokens,
            prompt_token_ids=self.prompt_token_ids,
            output_token_ids=self.output_token_ids,
            masked_token_ids=self._barred if below_minimum else _NONE_BARRED,
            num_logprobs=self.num_logprobs,
            num_pending=self.num_pending,
        )


@dataclass(slots=True, kw_only=True)
class StepItem:
    """One sequence's part of a finished step.

    `token_ids` holds one token per seed if the step sampled. With `is_finished` the sequence has
    left the scheduler; its blocks are freed after the callback unless that sets `keep_blocks`,
    which makes them the caller's to free. `finish_reason` stays None for several seeds (the caller
    derives each) and for a prefill whose only token ends nothing.
    """

    sequence: Sequence
    num_computed_before: int
    num_computed_after: int
    num_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason | None = None
    is_finished: bool = False
    keep_blocks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """A finished step: its number (from 1), where its time went, and its items.

    Sequences dropped or finished while the step ran are not among the items: num_cancelled and
    num_discarded count the tokens of either kind. graph_rows: of the CUDA graph that was replayed,
    0 without one, None where there are no graphs. done_at is when the results were there, on the
    monotonic clock. All times are seconds: schedule_s on the loop, forward_s and sample_s where the
    tensors are, gap_s between the end of the step before (or this one's launch) and its start,
    emit_s in the callback of the step before.
    """

    step: int
    schedule_s: float
    forward_s: float
    sample_s: float
    gap_s: float
    emit_s: float
    num_cancelled: int
    num_discarded: int
    graph_rows: int | None
    done_at: float
    items: list[StepItem]

    @property
    def duration_s(self) -> float:
        """Seconds of computing."""
        return self.forward_s + self.sample_s
