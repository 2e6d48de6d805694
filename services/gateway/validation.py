"""From a GenerateRequest to a request that can be served.

Owns every limit of the public contract and the defaults; each refusal names the field's path, its
value and the limit. Never tokenizes and never looks at other requests.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.errors import NotFound, invalid
from protos import common_pb2, gateway_pb2
from services.gateway import limits
from services.gateway.catalog import ServedModel

MAX_NAME_LEN = 128
MAX_SEQUENCES = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_LISTED_TOKENS = 4096
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to continue; exactly one of the three is set."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRequest:
    """A checked request with defaults; `max_new_tokens` None is what the context leaves."""

    request_id: str
    prompt: Prompt
    sampling: common_pb2.SamplingParams
    stopping: common_pb2.StoppingParams
    max_new_tokens: int | None
    eos_token_ids: tuple[int, ...]
    num_logprobs: int | None
    num_prompt_logprobs: int | None
    skip_special_tokens: bool
    echo: bool
    priority: int
    session_id: str
    cache_salt: str


def validate(request: gateway_pb2.GenerateRequest, model: ServedModel) -> ValidRequest:
    """Checks everything that can be known before tokenizing.

    Raises InvalidArgument with the field's path, NotFound for another model's name.
    """
    check_model(request.model, model)
    limits.check_len("request_id", request.request_id, MAX_NAME_LEN)
    limits.check_len("session_id", request.session_id, MAX_NAME_LEN)
    limits.check_len("cache_salt", request.cache_salt, MAX_NAME_LEN)
    limits.check_value("priority", request.priority, -100, 100)
    prompt = _prompt(request, model)
    eos = () if request.stopping.ignore_eos else model.eos_token_ids
    sampling = _sampling(request.sampling, model.vocab_size)
    stopping = _stopping(request.stopping, model.vocab_size)
    _check_choice(sampling, stopping, eos, model.vocab_size)
    output = request.output
    limits.check_number(output, "output", "logprobs", 0, MAX_LOGPROBS)
    limits.check_number(output, "output", "prompt_logprobs", 0, MAX_LOGPROBS)
    given_max = request.stopping.HasField("max_new_tokens")
    return ValidRequest(
        request_id=request.request_id or secrets.token_hex(16),
        prompt=prompt,
        sampling=sampling,
        stopping=stopping,
        max_new_tokens=request.stopping.max_new_tokens if given_max else None,
        eos_token_ids=tuple(eos),
        num_logprobs=output.logprobs if output.HasField("logprobs") else None,
        num_prompt_logprobs=(
            output.prompt_logprobs if output.HasField("prompt_logprobs") else None
        ),
        skip_special_tokens=not output.HasField("skip_special_tokens")
        or output.skip_special_tokens,
        echo=output.echo,
        priority=request.priority,
        session_id=request.session_id,
        cache_salt=request.cache_salt,
    )


def check_model(name: str, model: ServedModel) -> None:
    """An empty name is the only model served; another name is NotFound."""
    if name and name != model.name:
        raise NotFound(
            f"model: {name!r} is not served here; the model is {model.name!r}",
            reason="MODEL_NOT_FOUND",
        )


def chat_messages(chat: gateway_pb2.ChatPrompt, field: str) -> tuple[tuple[str, str], ...]:
    """The messages of a conversation: at least one, each with a role."""
    if not chat.messages:
        raise invalid(f"{field}.messages", "has 0 entries, needs at least 1")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise invalid(f"{field}.messages[{index}].role", "is empty")
    return tuple((message.role, message.content) for message in chat.messages)


def max_new_tokens(request: ValidRequest, prompt_len: int, context_len: int) -> int:
    """The number of tokens each sequence may have, once the prompt's length is known.

    Raises InvalidArgument for an empty prompt, one that leaves no room for a token, and an explicit
    `max_new_tokens` (or a `min_new_tokens`) beyond the context.
    """
    field = _prompt_field(request.prompt)
    if prompt_len == 0:
        raise invalid(field, "is 0 tokens long, needs at least 1")
    left = context_len - prompt_len
    if left < 1:
        raise invalid(
            field,
            f"is {prompt_len} tokens long, the limit is {context_len - 1} "
            f"(a context of {context_len} less one new token)",
        )
    wanted = request.max_new_tokens
    if wanted is not None and wanted > left:
        raise invalid(
            "stopping.max_new_tokens",
            f"is {wanted}, the limit is {left} after a prompt of {prompt_len} tokens "
            f"in a context of {context_len}",
        )
    allowed = left if wanted is None else wanted
    if request.stopping.min_new_tokens > allowed:
        raise invalid(
            "stopping.min_new_tokens",
            f"is {request.stopping.min_new_tokens}, the limit is the most new tokens, {allowed}",
        )
    return allowed


def _prompt_field(prompt: Prompt) -> str:
    if prompt.messages:
        return "chat.messages"
    return "token_ids.ids" if prompt.token_ids else "text"


def _prompt(request: gateway_pb2.GenerateRequest, model: ServedModel) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise invalid("prompt", "is not set; one of text, token_ids, chat is needed")
    if kind == "text":
        if not request.text:
            raise invalid("text", "is empty")
        return Prompt(text=request.text)
    if kind == "chat":
        return Prompt(messages=chat_messages(request.chat, "chat"))
    ids = request.token_ids.ids
    if not ids:
        raise invalid("token_ids.ids", "has 0 entries, needs at least 1")
    if len(ids) >= model.context_len:
        raise invalid(
            "token_ids.ids", f"has {len(ids)} entries, the limit is {model.context_len - 1}"
        )
    limits.check_token_ids("token_ids.ids", ids, model.vocab_size)
    return Prompt(token_ids=tuple(ids))


def _sampling(given: common_pb2.SamplingParams, vocab_size: int) -> common_pb2.SamplingParams:
    """Checked sampling parameters with the documented defaults; fixes a seed when there is none."""
    path = "sampling"
    limits.check_number(given, path, "temperature", 0, 2)
    limits.check_number(given, path, "top_p", 0, 1, is_low_open=True)
    limits.check_number(given, path, "top_k", 0, math.inf)
    limits.check_number(given, path, "min_p", 0, 1)
    limits.check_number(given, path, "presence_penalty", -2, 2)
    limits.check_number(given, path, "frequency_penalty", -2, 2)
    limits.check_number(given, path, "repetition_penalty", 0, 10, is_low_open=True)
    limits.check_number(given, path, "num_sequences", 1, MAX_SEQUENCES)
    limits.check_count("sampling.logit_bias", given.logit_bias, MAX_LOGIT_BIASES)
    for token_id, bias in given.logit_bias.items():
        entry = f"sampling.logit_bias[{token_id}]"
        if token_id >= vocab_size:
            raise invalid(
                entry, f"is token id {token_id}, must be below the vocabulary size {vocab_size}"
            )
        limits.check_value(entry, bias, -100, 100)
    for name in ("allowed_token_ids", "bad_token_ids"):
        limits.check_count(f"sampling.{name}", getattr(given, name), MAX_LISTED_TOKENS)
        limits.check_token_ids(f"sampling.{name}", getattr(given, name), vocab_size)
    filled = common_pb2.SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=secrets.randbits(64),
        num_sequences=1,
    )
    filled.MergeFrom(given)
    return filled


def _stopping(given: common_pb2.StoppingParams, vocab_size: int) -> common_pb2.StoppingParams:
    """Checked stopping parameters; `max_new_tokens` stays absent when it was not given."""
    limits.check_number(given, "stopping", "max_new_tokens", 1, math.inf)
    limits.check_number(given, "stopping", "min_new_tokens", 0, math.inf)
    limits.check_count("stopping.stop_strings", given.stop_strings, MAX_STOP_STRINGS)
    for index, stop in enumerate(given.stop_strings):
        num_bytes = len(stop.encode("utf-8"))
        if not 1 <= num_bytes <= MAX_STOP_STRING_BYTES:
            raise invalid(
                f"stopping.stop_strings[{index}]",
                f"has {num_bytes} UTF-8 bytes, must have 1 to {MAX_STOP_STRING_BYTES}",
            )
    limits.check_count("stopping.stop_token_ids", given.stop_token_ids, MAX_STOP_TOKENS)
    limits.check_token_ids("stopping.stop_token_ids", given.stop_token_ids, vocab_size)
    filled = common_pb2.StoppingParams(
        min_new_tokens=0, ignore_eos=False, include_stop_string=False
    )
    filled.MergeFrom(given)
    return filled


def _check_choice(
    sampling: common_pb2.SamplingParams,
    stopping: common_pb2.StoppingParams,
    eos_token_ids: Sequence[int],
    vocab_size: int,
) -> None:
    """At every position some token must be left to choose."""
    bad = set(sampling.bad_token_ids)
    allowed = set(sampling.allowed_token_ids)
    num_left = len(allowed - bad) if allowed else vocab_size - len(bad)
    if num_left < 1:
        field = "allowed_token_ids" if allowed else "bad_token_ids"
        raise invalid(f"sampling.{field}", "leaves 0 tokens to choose from, needs at least 1")
    if not stopping.min_new_tokens:
        return
    barred = bad | set(stopping.stop_token_ids) | set(eos_token_ids)
    num_left = len(allowed - barred) if allowed else vocab_size - len(barred)
    if num_left < 1:
        raise invalid(
            "stopping.min_new_tokens",
            f"is {stopping.min_new_tokens}, but every token that may be chosen ends the sequence",
        )
