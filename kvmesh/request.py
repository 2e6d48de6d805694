"""A GenerateRequest out of Python values.

Owns the options' names and their place in the proto. Types and what their integers hold are checked
here, limits by the gateway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

from google.protobuf.descriptor import FieldDescriptor

from mesh.errors import InvalidArgument, invalid
from protos import common_pb2, gateway_pb2

Prompt = str | Sequence[int]
Message = Mapping[str, str]


class GenerateOptions(TypedDict, total=False):
    """Every option of a generation; names, limits and defaults as in protos/."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    num_sequences: int
    logit_bias: Mapping[int, float]
    allowed_token_ids: Iterable[int]
    bad_token_ids: Iterable[int]
    max_new_tokens: int
    min_new_tokens: int
    stop_strings: Iterable[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    include_stop_string: bool
    logprobs: int
    prompt_logprobs: int
    skip_special_tokens: bool
    echo: bool
    request_id: str
    model: str
    priority: int
    session_id: str
    cache_salt: str


_PARTS = {
    "sampling": common_pb2.SamplingParams.DESCRIPTOR.fields_by_name,
    "stopping": common_pb2.StoppingParams.DESCRIPTOR.fields_by_name,
    "output": gateway_pb2.OutputOptions.DESCRIPTOR.fields_by_name,
}
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_TOP = ("request_id", "model", "priority", "session_id", "cache_salt")


def generate_request(
    prompt: Prompt | None, messages: Sequence[Message] | None, options: GenerateOptions
) -> gateway_pb2.GenerateRequest:
    """The request for a text, token ids or (prompt None) chat messages.

    Raises TypeError for an option that does not exist, InvalidArgument (with the field's path) for
    a value of the wrong type or beyond what the field's type holds.
    """
    request = gateway_pb2.GenerateRequest()
    if messages is not None:
        request.chat.CopyFrom(chat_prompt(messages))
    elif isinstance(prompt, str):
        _assign(request, "text", prompt, "text")
    else:
        request.token_ids.SetInParent()
        _assign(request.token_ids, "ids", prompt, "token_ids.ids")
    for name, value in options.items():
        if value is not None:
            _set_option(request, name, value)
    return request


def chat_prompt(messages: Sequence[Message]) -> gateway_pb2.ChatPrompt:
    """Chat messages, each a mapping of role and content."""
    prompt = gateway_pb2.ChatPrompt()
    for index, message in enumerate(messages):
        path = f"chat.messages[{index}]"
        if set(message) != {"role", "content"}:
            raise invalid(path, f"has keys {sorted(message)}; give role and content")
        entry = prompt.messages.add()
        _assign(entry, "role", message["role"], f"{path}.role")
        _assign(entry, "content", message["content"], f"{path}.content")
    return prompt


def _set_option(request: gateway_pb2.GenerateRequest, name: str, value: object) -> None:
    if name in _TOP:
        _assign(request, name, value, name)
        return
    for part, fields in _PARTS.items():
        if name in fields:
            _assign(getattr(request, part), name, value, f"{part}.{name}")
            return
    known = sorted(GenerateOptions.__annotations__)
    raise TypeError(f"generate() has no option {name!r}; there are {', '.join(known)}")


def _assign(message: Any, name: str, value: Any, path: str) -> None:
    """Sets one field of any kind; a value that does not fit names the field's path."""
    try:
        target = getattr(message, name)
        if hasattr(target, "update"):
            target.update(value)
        elif hasattr(target, "extend"):
            if isinstance(value, str):
                raise TypeError("a single string; give a list")
            value = list(value)  # an iterator is read once, also when an entry is refused
            target.extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        field = message.DESCRIPTOR.fields_by_name[name]
        raise _beyond_range(field, value, path) or invalid(path, f"{value!r}: {error}") from None


def _beyond_range(field: FieldDescriptor, value: Any, path: str) -> InvalidArgument | None:
    """The error for the first integer that the field's type cannot hold; None when all fit."""
    if isinstance(value, Mapping):
        field = field.message_type.fields_by_name["key"]
    if field.cpp_type not in _RANGES:
        return None
    low, high = _RANGES[field.cpp_type]
    for place, number in _entries(value):
        if isinstance(number, int) and not low <= number <= high:
            return invalid(f"{path}{place}", f"{number}; must be {low} to {high}")
    return None


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """A value's integers, each with what follows the field's path: [index], [key] or nothing."""
    if isinstance(value, Mapping):
        yield from ((f"[{key}]", key) for key in value)
    elif isinstance(value, list):
        yield from ((f"[{index}]", entry) for index, entry in enumerate(value))
    else:
        yield "", value
