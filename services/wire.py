"""Translation between wire messages and engine values, for the two services that run an engine.

Owns the one mapping of each enum and parameter; never validates (the gateway did) and holds no
state.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.plan import FinishReason, PositionLogprobs, SamplingParams, StoppingParams, TokenLogprob
from protos import common_pb2

_FINISH_REASONS = {
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.STOP_TOKEN: common_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.EOS: common_pb2.FINISH_REASON_EOS,
}


def sampling_params(message: common_pb2.SamplingParams) -> SamplingParams:
    """The engine's sampling parameters; absent scalars take the documented defaults."""
    scalars = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    )
    given = {name: getattr(message, name) for name in scalars if message.HasField(name)}
    return SamplingParams(
        **given,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        allowed_token_ids=tuple(sorted(set(message.allowed_token_ids))),
        bad_token_ids=tuple(sorted(set(message.bad_token_ids))),
    )


def stopping_params(
    message: common_pb2.StoppingParams, eos_token_ids: Iterable[int]
) -> StoppingParams:
    """The engine's stopping parameters; `max_new_tokens` must be present (the gateway fills it)."""
    if not message.HasField("max_new_tokens"):
        raise ValueError("stopping.max_new_tokens is absent; the gateway must fill it in")
    return StoppingParams(
        max_new_tokens=message.max_new_tokens,
        min_new_tokens=message.min_new_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        eos_token_ids=frozenset(eos_token_ids),
    )


def finish_reason(reason: FinishReason | None) -> common_pb2.FinishReason:
    """The wire's finish reason; UNSPECIFIED while the sequence goes on."""
    return _FINISH_REASONS[reason] if reason else common_pb2.FINISH_REASON_UNSPECIFIED


def position_logprobs(value: PositionLogprobs) -> common_pb2.PositionLogprobs:
    """One position's log probabilities; token texts are the gateway's to fill."""
    return common_pb2.PositionLogprobs(
        chosen=_token_logprob(value.chosen), top=[_token_logprob(token) for token in value.top]
    )


def _token_logprob(value: TokenLogprob) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(token_id=value.token_id, logprob=value.logprob, rank=value.rank)
