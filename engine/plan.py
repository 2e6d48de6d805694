"""What a step is told and what it answers: frozen values between scheduler, runner and sampler.

Owns no state and no tensors; the scheduler builds a `Chunk` per scheduled sequence, the runner
answers with a `ChunkResult` per chunk, in order. Nothing is changed once made; what is made per row
and step is not frozen, as that costs 2 microseconds each, a millisecond of a step of 256 rows.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

UNKNOWN_TOKEN = -1


class FinishReason(enum.Enum):
    """Why a sequence ended on an engine (stop strings are the gateway's)."""

    LENGTH = "length"
    STOP_TOKEN = "stop_token"
    EOS = "eos"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; meanings and limits as in protos/common.proto, defaults filled in."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingParams:
    """When a sequence ends, as far as an engine can see it."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token's log probability and its zero-based rank among all tokens."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """The chosen token and the most likely alternatives, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True, kw_only=True)
class SampleRequest:
    """Asks for one next token per seed from the distribution after the chunk's last token.

    `position` is the absolute position of the token to be sampled (prompt length + output length);
    random numbers are a function of (seed, position) alone. `masked_token_ids` are barred now
    (EOS and stop tokens before min_new_tokens). Penalties read the two token lists; the outputs are
    the first position - len(prompt_token_ids) - num_pending of `output_token_ids` (which grows
    while the step waits) and then the `num_pending` tokens (0 or 1) of the step before.
    """

    params: SamplingParams
    seeds: tuple[int, ...]
    position: int
    prompt_token_ids: tuple[int, ...] | list[int] = ()
    output_token_ids: tuple[int, ...] | list[int] = ()
    masked_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    num_pending: int = 0


@dataclass(slots=True, kw_only=True)
class Chunk:
    """Tokens of one sequence to compute in this step.

    `token_ids` stand at positions start .. start + len - 1; `blocks` lists every block of the
    sequence up to and including those positions. `sample` is None when more prompt follows.
    With `follows` the only token is not known yet (UNKNOWN_TOKEN stands for it): it is the one that
    chunk number `follows` of the step launched before samples. Positions from `prompt_len` on hold
    outputs.
    `prompt_logprobs` asks for that many alternatives at each chunk position whose next token is in
    `next_token_ids` (same length as token_ids, or one shorter on the last prompt chunk).
    """

    token_ids: list[int]
    start: int
    blocks: list[int]
    sample: SampleRequest | None = None
    prompt_logprobs: int | None = None
    next_token_ids: list[int] = field(default_factory=list)
    follows: int | None = None
    prompt_len: int = 0


@dataclass(slots=True, kw_only=True)
class ChunkResult:
    """One token per seed (empty when the chunk did not sample), with logprobs when asked for."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()


class Step(Protocol):
    """A launched step. Times are known once its results are."""

    @property
    def is_done(self) -> bool:
        """Whether the results are there without waiting."""
        ...

    def wait_written(self) -> bool:
        """Waits until its KV is in the cache; False if that is not known before it is done."""
        ...

    @property
    def forward_s(self) -> float:
        """Seconds the model took, on the device that computes."""
        ...

    @property
    def sample_s(self) -> float:
        """Seconds logits and sampling took."""
        ...

    @property
    def graph_rows(self) -> int | None:
        """Rows of the CUDA graph it replayed; 0 without one, None where there are no graphs."""
        ...
