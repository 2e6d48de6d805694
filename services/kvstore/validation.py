"""The limits of KvStoreService requests.

Owns the checks and their sentences: field path, value, limit. Never touches state.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.errors import invalid

KEY_NUM_BYTES = 32
MAX_NUM_KEYS = 4096
MAX_TTL_S = 300.0
MAX_WAIT_S = 60.0
MAX_TENANT_NUM_BYTES = 64
MAX_LIFE_NUM_BYTES = 256


def check_keys(field: str, keys: Sequence[bytes]) -> None:
    """At most 4096 keys of 32 bytes."""
    check_count(field, keys)
    if set(map(len, keys)) <= {KEY_NUM_BYTES}:
        return
    for position, key in enumerate(keys):
        if len(key) != KEY_NUM_BYTES:
            raise invalid(f"{field}[{position}]", f"{len(key)} bytes; a key has {KEY_NUM_BYTES}")


def check_count(field: str, values: Sequence[object]) -> None:
    """At most 4096 values."""
    if len(values) > MAX_NUM_KEYS:
        raise invalid(field, f"{len(values)} values; the limit is {MAX_NUM_KEYS}")


def check_num_bytes(num_bytes: int, arena_num_bytes: int) -> None:
    """A block fits into the arena."""
    if not 0 < num_bytes <= arena_num_bytes:
        raise invalid("num_bytes", f"{num_bytes}; must be 1 to {arena_num_bytes}, the arena")


def check_ttl(ttl_s: float) -> None:
    """In (0, 300]; NaN is not."""
    if not 0 < ttl_s <= MAX_TTL_S:
        raise invalid("ttl_s", f"{ttl_s}; must be above 0 and at most {MAX_TTL_S:g} seconds")


def check_deadline(deadline_s: float) -> None:
    """In (0, 300]; NaN is not."""
    if not 0 < deadline_s <= MAX_TTL_S:
        raise invalid(
            "deadline_s", f"{deadline_s}; must be above 0 and at most {MAX_TTL_S:g} seconds"
        )


def check_local_offsets(offsets: Sequence[int], num_lent: int) -> None:
    """At least one, and no more than blocks that are lent."""
    if not 0 < len(offsets) <= num_lent:
        raise invalid("local_offsets", f"{len(offsets)} values; the lease has {num_lent} blocks")


def check_inside(field: str, offsets: Sequence[int], num_bytes: int, arena_num_bytes: int) -> None:
    """Blocks of num_bytes lie inside an arena."""
    room = arena_num_bytes - num_bytes
    for position, offset in enumerate(offsets):
        if offset > room:
            raise invalid(
                f"{field}[{position}]",
                f"{offset}; a block of {num_bytes} bytes must lie in the arena of "
                f"{arena_num_bytes} bytes",
            )


def check_wait(max_wait_s: float) -> None:
    """In [0, 60]; NaN is not."""
    if not 0 <= max_wait_s <= MAX_WAIT_S:
        raise invalid("max_wait_s", f"{max_wait_s}; must be 0 to {MAX_WAIT_S:g} seconds")


def check_same_len(
    field: str, values: Sequence[object], other: str, others: Sequence[object]
) -> None:
    """As many values as another field has."""
    count = len(others)
    if len(values) != count:
        raise invalid(field, f"{len(values)} values; {other} has {count}")


def check_text(field: str, value: str, max_num_bytes: int) -> None:
    """At most max_num_bytes of UTF-8."""
    num_bytes = len(value.encode())
    if num_bytes > max_num_bytes:
        raise invalid(field, f"{num_bytes} bytes; the limit is {max_num_bytes}")


def check_present(field: str, value: str) -> None:
    """Not empty."""
    if not value:
        raise invalid(field, "empty; a name is needed")
