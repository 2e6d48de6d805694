"""An answer as Python values: deltas as they stream, and the whole once it ended.

Owns the translation from GenerateResponse; never touches the network.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from protos import common_pb2, gateway_pb2


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    LENGTH = "length"
    STOP_TOKEN = "stop_token"
    EOS = "eos"
    STOP_STRING = "stop_string"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobEntry:
    """One token's log probability (natural log) and its zero-based rank among all tokens."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """The token at one position and the most likely alternatives, best first."""

    chosen: LogprobEntry
    top: tuple[LogprobEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New output of one sequence; text never splits a character and may lag behind the ids."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    sequence_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInfo:
    """What the gateway says before the first delta."""

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    seed: int
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Counts and seconds of one request; meanings as in protos/gateway.proto."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    queue_s: float
    prefill_s: float
    put_s: float
    get_s: float
    first_token_s: float
    decode_s: float
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceResult:
    """One whole sequence; `stop` is the stop string or token id that ended it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A whole answer."""

    prompt: PromptInfo
    sequences: tuple[SequenceResult, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first sequence's text."""
        return self.sequences[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first sequence's token ids."""
        return self.sequences[0].token_ids


@dataclass(slots=True)
class _Sequence:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: gateway_pb2.Finished | None = None


class Answer:
    """Collects one stream: `add` each message, then read `result`."""

    def __init__(self) -> None:
        self.prompt: PromptInfo | None = None
        self.usage: Usage | None = None
        self._sequences: dict[int, _Sequence] = {}

    def add(self, response: gateway_pb2.GenerateResponse) -> Delta | None:
        """Takes one message; returns its delta if it carries one."""
        event = response.WhichOneof("event")
        if event == "delta":
            return self._add_delta(response.delta)
        if event == "prompt_info":
            self.prompt = _prompt_info(response.prompt_info)
        elif event == "finished":
            self._sequence(response.finished.sequence_index).finished = response.finished
        elif event == "usage":
            self.usage = _usage(response.usage)
        return None

    @property
    def result(self) -> Result | None:
        """The whole answer; None until the stream ended normally."""
        if self.prompt is None or self.usage is None:
            return None
        sequences = [self._sequences[index] for index in sorted(self._sequences)]
        return Result(
            prompt=self.prompt,
            sequences=tuple(_sequence_result(sequence) for sequence in sequences),
            usage=self.usage,
        )

    def _add_delta(self, message: gateway_pb2.Delta) -> Delta:
        delta = Delta(
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=_positions(message.logprobs),
            sequence_index=message.sequence_index,
        )
        sequence = self._sequence(delta.sequence_index)
        sequence.text.append(delta.text)
        sequence.token_ids.extend(delta.token_ids)
        sequence.logprobs.extend(delta.logprobs)
        return delta

    def _sequence(self, index: int) -> _Sequence:
        return self._sequences.setdefault(index, _Sequence())


def _sequence_result(sequence: _Sequence) -> SequenceResult:
    finished = sequence.finished or gateway_pb2.Finished()
    which = finished.WhichOneof("stop")
    name = common_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
    return SequenceResult(
        text="".join(sequence.text),
        token_ids=tuple(sequence.token_ids),
        logprobs=tuple(sequence.logprobs),
        finish_reason=FinishReason.ABORTED if name == "unspecified" else FinishReason(name),
        stop=getattr(finished, which) if which else None,
    )


def _prompt_info(message: gateway_pb2.PromptInfo) -> PromptInfo:
    return PromptInfo(
        request_id=message.request_id,
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        seed=message.seed,
        prompt_logprobs=_positions(message.prompt_logprobs),
    )


def _usage(message: gateway_pb2.Usage) -> Usage:
    return Usage(**{name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name})


def _positions(messages: Sequence[common_pb2.PositionLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(chosen=_entry(message.chosen), top=tuple(map(_entry, message.top)))
        for message in messages
    )


def _entry(message: common_pb2.TokenLogprob) -> LogprobEntry:
    return LogprobEntry(
        token_id=message.token_id, text=message.text, logprob=message.logprob, rank=message.rank
    )
