"""One sequence on an engine: its tokens, its blocks, how far its KV is computed, when it ends.

Owns that progress and the building of chunks. Never allocates, never decides what runs.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.plan import (
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
    that a step always has logits to sample from. Blocks cover at least num_computed tokens.
    `order` ranks sequences: smaller goes first (higher priority, then earlier arrival).
    """

    __slots__ = (
        "_barred",
        "blocks",
        "finish_reason",
        "key",
        "num_computed",
        "num_logprobs",
        "num_preemptions",
        "num_prompt_logprobs",
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
        self.num_preemptions = 0
        self.state = SequenceState.NEW
        self.finish_reason: FinishReason | None = None
        self._barred = stopping.eos_token_ids | stopping.stop_token_ids

    def __repr__(self) -> str:
        return (
            f"Sequence({self.key!r}, {self.state.value}, {self.num_computed} of "
            f"{len(self.token_ids)} tokens computed, {len(self.blocks)} blocks)"
        )

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is missing, the last token included: at least 1."""
        return len(self.token_ids) - self.num_computed

    def chunk(self, num_tokens: int, block_tokens: int) -> Chunk:
        """The next num_tokens tokens to compute; samples if they reach the end.

        The sequence's blocks must cover them.
        """
        tokens, start = self.token_ids, self.num_computed
        end = start + num_tokens
        num_blocks = -(-end // block_tokens)
        assert start < end <= len(tokens), f"{self} cannot compute {num_tokens} tokens"
        assert num_blocks <= len(self.blocks), f"{self} has too few blocks for {end} tokens"
        blocks = self.blocks
        if num_blocks < len(blocks):
            blocks = blocks[:num_blocks]
        if num_tokens == 1 and self.num_prompt_logprobs is None and end == len(tokens):
            return Chunk(token_ids=tokens[-1:], start=start, blocks=blocks, sample=self._sample())
        following: list[int] = []
        if self.num_prompt_logprobs is not None:
            following = self.prompt_token_ids[start + 1 : end + 1]
        return Chunk(
            token_ids=tokens[start:end],
            start=start,
            blocks=blocks,
            sample=self._sample() if end == len(tokens) else None,
            prompt_logprobs=self.num_prompt_logprobs if following else None,
            next_token_ids=following,
        )

    def advance(self, chunk: Chunk, result: ChunkResult) -> StepItem:
        """Books a step: the chunk is computed; a single sampled token is appended."""
        before = self.num_computed
        token_ids = result.token_ids
        num_tokens = len(chunk.token_ids)
        self.num_computed = before + num_tokens
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
        assert self.num_computed <= len(self.blocks) * block_tokens, f"{self}: blocks too few"
        assert len(set(self.blocks)) == len(self.blocks), f"{self}: a block twice"

    def _sample(self) -> SampleRequest:
        below_minimum = len(self.output_token_ids) < self.stopping.min_new_tokens
        return SampleRequest(
            params=self.sampling,
            seeds=self.seeds,
            position=len(self.token_ids),
            prompt_token_ids=self.prompt_token_ids,
            output_token_ids=self.output_token_ids,
            masked_token_ids=self._barred if below_minimum else _NONE_BARRED,
            num_logprobs=self.num_logprobs,
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
    """A finished step: its number (from 1), seconds in the engine thread, and its items.

    Sequences dropped while the step ran are not among the items.
    """

    step: int
    duration_s: float
    items: list[StepItem]
