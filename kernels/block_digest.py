"""The 64-bit digest of KV blocks: where the bytes are, at the speed of the memory.

Each 64-bit little-endian word w at index i contributes mix(w + (i + 1) * C1), mix(x) = (x ^ x >>
32) * C2,
then x ^ x >> 29; contributions add up modulo 2^64. Sums commute, so any split of the words over
threads
gives the same digest; the index constant makes it sensitive to order. Not cryptographic: it guards
against corruption, not against an attacker on the private network.
"""

from __future__ import annotations

import torch

_C1 = 0x9E3779B97F4A7C15 - 2**64
_C2 = 0xBF58476D1CE4E5B9 - 2**64
_LOW_32, _LOW_35 = 2**32 - 1, 2**35 - 1
# Words per pass: temporaries stay in the cache.
_PASS_WORDS = 16_384


def block_digest(blocks: torch.Tensor) -> list[int]:
    """blocks [num_blocks, num_bytes] uint8, contiguous rows, num_bytes divisible by 8 ->
    digests.
    """
    if blocks.shape[1] % 8:
        raise ValueError(f"block of {blocks.shape[1]} bytes; the digest needs a multiple of 8")
    words = blocks.view(torch.int64)
    num_words = words.shape[1]
    index = torch.arange(1, min(num_words, _PASS_WORDS) + 1, device=blocks.device) * _C1
    digests: list[int] = []
    for row in words:
        total = 0
        for start in range(0, num_words, _PASS_WORDS):
            part = row[start : start + _PASS_WORDS]
            x = part + index[: part.shape[0]]
            x += _wrap(start * _C1)
            x ^= (x >> 32) & _LOW_32
            x *= _C2
            x ^= (x >> 29) & _LOW_35
            total += int(x.sum())
        digests.append(total % 2**64)
    return digests


def _wrap(value: int) -> int:
    """The signed 64-bit integer with value's low 64 bits."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
