"""The 64-bit digest of a block, in numpy, for processes without torch.

The function is that of kernels/block_digest.py, where it is explained: word w (uint64,
little-endian) at index i contributes mix(w + (i + 1) * C1), where mix(x) is x ^= x >> 32; x *= C2;
x ^= x >> 29. Contributions add up modulo 2^64. Detects corruption, not an attacker.
"""

from __future__ import annotations

import numpy as np

WORD_NUM_BYTES = 8
_C1 = 0x9E3779B97F4A7C15
_C2 = 0xBF58476D1CE4E5B9
_PASS_WORDS = 16_384  # temporaries stay in the cache
_STEPS = np.arange(1, _PASS_WORDS + 1, dtype=np.uint64) * np.uint64(_C1)


def block_digest(data: memoryview) -> int:
    """The unsigned digest of contiguous bytes; lets other threads run meanwhile.

    ValueError: not a whole number of 8-byte words.
    """
    if data.nbytes % WORD_NUM_BYTES:
        raise ValueError(f"data: {data.nbytes} bytes; the digest needs a multiple of 8")
    words = np.frombuffer(data, dtype="<u8")
    mixed, shifted = np.empty((2, min(len(words), _PASS_WORDS)), dtype=np.uint64)
    total = 0
    for start in range(0, len(words), _PASS_WORDS):
        part = words[start : start + _PASS_WORDS]
        x, y = mixed[: len(part)], shifted[: len(part)]
        np.add(part, _STEPS[: len(part)], out=x)
        np.add(x, np.uint64(start * _C1 % 2**64), out=x)
        np.bitwise_xor(x, np.right_shift(x, 32, out=y), out=x)
        np.multiply(x, np.uint64(_C2), out=x)
        np.bitwise_xor(x, np.right_shift(x, 29, out=y), out=x)
        total += int(x.sum())
    return total % 2**64
