"""A promotion begun as a whole, for tests that do not care for its parts."""

from __future__ import annotations

from collections.abc import Sequence

from services.kvstore.lower_tier import LowerTier, Move
from services.kvstore.tiers import LowerTiers


def promote(
    lower: LowerTiers, keys: Sequence[bytes], num_bytes: int, sources: Sequence[LowerTier]
) -> tuple[list[Move], list[int]]:
    """Moves and awaited rows of all parts."""
    parts = list(lower.promote(keys, num_bytes, sources))
    return [m for moves, _ in parts for m in moves], [row for _, rows in parts for row in rows]
