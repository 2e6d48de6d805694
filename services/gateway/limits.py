"""Checks of single fields against the limits written in the protos.

Owns the wording: every refusal is INVALID_ARGUMENT and names field, value and limit. Never fills
in defaults.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from google.protobuf.message import Message

from mesh.errors import invalid


def check_number(
    message: Message,
    path: str,
    name: str,
    low: float,
    high: float,
    *,
    is_low_open: bool = False,
) -> None:
    """An optional number must be finite and in [low, high], or (low, high] when `is_low_open`."""
    if message.HasField(name):
        check_value(f"{path}.{name}", getattr(message, name), low, high, is_low_open=is_low_open)


def check_value(
    field: str, value: float, low: float, high: float, *, is_low_open: bool = False
) -> None:
    """A number must be finite and in [low, high], or (low, high] when `is_low_open`."""
    above = value > low if is_low_open else value >= low
    if math.isfinite(value) and above and value <= high:
        return
    if math.isinf(high):
        limit = f"at least {low:g}"
    else:
        limit = f"in {'(' if is_low_open else '['}{low:g}, {high:g}]"
    raise invalid(field, f"is {value:g}, must be {limit}")


def check_len(field: str, text: str, limit: int) -> None:
    """A text must have at most `limit` characters."""
    if len(text) > limit:
        raise invalid(field, f"has {len(text)} characters, the limit is {limit}")


def check_count(field: str, items: Collection[object], limit: int) -> None:
    """A list or map must have at most `limit` entries."""
    if len(items) > limit:
        raise invalid(field, f"has {len(items)} entries, the limit is {limit}")


def check_token_ids(field: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Every id must lie in the vocabulary; the refusal names the first bad entry."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise invalid(
                f"{field}[{index}]",
                f"is token id {token_id}, must be below the vocabulary size {vocab_size}",
            )
