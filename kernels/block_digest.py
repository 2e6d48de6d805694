"""The 64-bit digest of KV blocks: where the bytes are, at the speed of the memory.

Word w (uint64, little-endian) at index i contributes mix(w + (i + 1) * C1), where mix(x) is
x ^= x >> 32; x *= C2; x ^= x >> 29. Contributions add up modulo 2^64. Sums commute, so any split of
the words over threads gives the same digest; the index constant makes it sensitive to order, and to
length when zeros are cut off or added. mix is a bijection (an odd factor, xor-shifts), so one
changed word always changes the digest. Not cryptographic: it guards against corruption, not against
an attacker on the private network.
"""

# Triton's jit is beyond the type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_C1 = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio (Steele, Lea, Flood 2014)
_C2 = 0xBF58476D1CE4E5B9 - 2**64  # splitmix64's first factor
_LOW_32, _LOW_35 = 2**32 - 1, 2**35 - 1
# Words per pass of the twin: temporaries stay in the cache.
_PASS_WORDS = 16_384
# Words per step and steps per program of the kernel.
_STEP_WORDS, _NUM_STEPS = 512, 2


def block_digest(
    blocks: torch.Tensor, block_ids: Sequence[int] | torch.Tensor | None = None
) -> list[int]:
    """One unsigned 64-bit digest per block of blocks [num_blocks, num_bytes] uint8.

    block_ids: only these rows, in this order, without a gathered copy. Rows must be contiguous,
    num_bytes divisible by 8 and listed ids within blocks; anything else is a ValueError. Waits for
    the result.
    """
    if blocks.shape[1] % 8:
        raise ValueError(f"blocks: {blocks.shape[1]} bytes each; the digest needs a multiple of 8")
    if blocks.stride(1) != 1:
        raise ValueError("blocks: rows are not contiguous")
    if isinstance(block_ids, Sequence) and any(not 0 <= i < blocks.shape[0] for i in block_ids):
        raise ValueError(f"block_ids: {list(block_ids)} with {blocks.shape[0]} blocks")
    words = blocks.view(torch.int64)  # [num_blocks, num_words]
    if words.is_cuda:
        totals = _launch_triton(words, block_ids)
    elif block_ids is None:
        totals = _totals_torch(words)
    else:
        totals = torch.cat(
            [words.new_zeros(0), *(_totals_torch(words[i, None]) for i in block_ids)]
        )
    return [total % 2**64 for total in totals.tolist()]


def _totals_torch(words: torch.Tensor) -> torch.Tensor:
    """Digests [num_blocks] int64 of words [num_blocks, num_words] int64."""
    num_words = words.shape[1]
    rows_per_pass = max(1, _PASS_WORDS // max(1, num_words))
    width = min(num_words, _PASS_WORDS)
    index = torch.arange(1, width + 1, device=words.device) * _C1
    totals = torch.zeros(words.shape[0], dtype=torch.int64, device=words.device)
    for row in range(0, words.shape[0], rows_per_pass):
        rows = slice(row, row + rows_per_pass)
        for start in range(0, num_words, _PASS_WORDS):
            part = words[rows, start : start + _PASS_WORDS]
            totals[rows] += _contributions(part, index[: part.shape[1]], start).sum(dim=1)
    return totals


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


@triton.jit
def _digest_kernel(
    words_ptr,
    block_ids_ptr,
    totals_ptr,
    stride_block,
    num_words,
    num_parts,
    C1: tl.constexpr,
    C2: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_STEPS: tl.constexpr,
):
    """Adds the contributions of NUM_STEPS * BLOCK words of one block to its total."""
    row = (tl.program_id(0) // num_parts).to(tl.int64)
    block = row
    if HAS_IDS:
        block = tl.load(block_ids_ptr + row).to(tl.int64)
    words_ptr += block * stride_block
    start = (tl.program_id(0) % num_parts).to(tl.int64) * (BLOCK * NUM_STEPS)
    lane = tl.arange(0, BLOCK)
    keys = (start + lane + 1) * C1  # wraps around, as every sum and product here
    step_key = tl.full([1], BLOCK, tl.int64) * C1
    total = tl.zeros([BLOCK], dtype=tl.uint64)
    left = num_words - start
    for step in tl.static_range(NUM_STEPS):
        mask = step * BLOCK + lane < left
        words = tl.load(words_ptr + start + step * BLOCK + lane, mask=mask, other=0)
        mixed = (words + keys).to(tl.uint64, bitcast=True)
        mixed ^= mixed >> 32
        mixed *= C2
        mixed ^= mixed >> 29
        total += tl.where(mask, mixed, 0)
        keys += step_key
    total = tl.sum(total.to(tl.int64, bitcast=True), axis=0)
    tl.atomic_add(totals_ptr + row, total, sem="relaxed")


def _launch_triton(
    words: torch.Tensor,
    block_ids: Sequence[int] | torch.Tensor | None,
    step_words: int = _STEP_WORDS,
    num_steps: int = _NUM_STEPS,
    num_warps: int = 4,
) -> torch.Tensor:
    """Digests [num_blocks] int64 of words [num_blocks, num_words] int64."""
    ids = words if block_ids is None else torch.as_tensor(block_ids, device=words.device)
    num_rows = ids.shape[0]
    totals = torch.zeros(num_rows, dtype=torch.int64, device=words.device)
    num_words = words.shape[1]
    num_parts = triton.cdiv(num_words, step_words * num_steps)
    if num_rows and num_words:
        _digest_kernel[(num_parts * num_rows,)](
            words,
            ids,
            totals,
            words.stride(0),
            num_words,
            num_parts,
            C1=_C1,
            C2=_C2 % 2**64,
            HAS_IDS=block_ids is not None,
            BLOCK=step_words,
            NUM_STEPS=num_steps,
            num_warps=num_warps,
        )
    return totals
