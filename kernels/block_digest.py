"""The 64-bit digest of KV blocks: where the bytes are, at the speed of the memory.

Word w (uint64, little-endian) at index i contributes mix(w + (i + 1) * C1), where mix(x) is
x ^= x >> 32; x *= C2; x ^= x >> 29. Contributions add up modulo 2^64. Sums commute, so any split of
the words over threads gives the same digest; the index constant makes it sensitive to order, and to
length when zeros are cut off or added. mix is a bijection (an odd factor, xor-shifts), so one
changed word always changes the digest. Not cryptographic: it guards against corruption, not against
an attacker on the private network.
"""

from __future__ import annotations

import torch

_C1 = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio (Steele, Lea, Flood 2014)
_C2 = 0xBF58476D1CE4E5B9 - 2**64  # splitmix64's first factor
_LOW_32, _LOW_35 = 2**32 - 1, 2**35 - 1
# Words per pass: temporaries stay in the cache.
_PASS_WORDS = 16_384


def block_digest(blocks: torch.Tensor) -> list[int]:
    """blocks [num_blocks, num_bytes] uint8 -> one unsigned 64-bit digest per block.

    Rows must be contiguous and num_bytes divisible by 8; anything else is a ValueError.
    """
    if blocks.shape[1] % 8:
        raise ValueError(f"blocks: {blocks.shape[1]} bytes each; the digest needs a multiple of 8")
    words = blocks.view(torch.int64)  # [num_blocks, num_words]
    num_words = words.shape[1]
    rows_per_pass = max(1, _PASS_WORDS // max(1, num_words))
    width = min(num_words, _PASS_WORDS)
    index = torch.arange(1, width + 1, device=blocks.device) * _C1
    totals = torch.zeros(words.shape[0], dtype=torch.int64, device=blocks.device)
    for row in range(0, words.shape[0], rows_per_pass):
        rows = slice(row, row + rows_per_pass)
        for start in range(0, num_words, _PASS_WORDS):
            part = words[rows, start : start + _PASS_WORDS]
            totals[rows] += _contributions(part, index[: part.shape[1]], start).sum(dim=1)
    return [total % 2**64 for total in totals.tolist()]


def _contributions(words: torch.Tensor, index: torch.Tensor, start: int) -> torch.Tensor:
    """Contributions of words [num_rows, n] that stand from index `start` on; int64 wraps around."""
    mixed = words + (index + _wrap(start * _C1))
    mixed ^= (mixed >> 32).bitwise_and_(_LOW_32)
    mixed *= _C2
    mixed ^= (mixed >> 29).bitwise_and_(_LOW_35)
    return mixed


def _wrap(value: int) -> int:
    """The signed 64-bit integer with value's low 64 bits."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
