"""Matrix product of few rows with a large weight, at the speed of the weight's bytes.

Owns the kernel of one block a program. Its MMA takes weight rows as M and tokens as N, so that a
handful of tokens wastes no tensor-core rows. K is cut into a fixed number of splits; with more than
one the kernel leaves partial sums to its consumer (kernels.product). A block may have weight rows
in two accumulators, for the sizes between powers of two that fill a chip. Never chooses tiles.

Order of summation (the same in kernels.matmul_prefill): inside a split the tensor core's own
accumulator from the first to the last k. For e4m3 that is the fast accumulation of Hopper, whose
adder keeps about 14 bits: the relative error of a bf16 result (1.7e-3 with exact sums) is 2.1e-3 at
K 4096 and 3.1e-3 at K 12288 (measured; random operands; torch's `use_fast_accum` is the same).
Block-scaled weights move it to fp32 after every 128 of K. Splits are added in order in fp32.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.matmul_launch import (
    constants,
    descriptors,
    extra_descriptors,
    factors,
    out_descriptor,
)
from kernels.matmul_split import plain_split, scaled_split
from kernels.matmul_store import finish_block, load_factors, store_block
from kernels.matmul_tiles import PREFETCH_BYTES, Tiles
from kernels.product import Product
from kernels.weight import Weight

_PREFETCH_BYTES = tl.constexpr(PREFETCH_BYTES)


@triton.jit
def prefetch_rows(ptr, NUM_BYTES: tl.constexpr):
    """Asks L2 for NUM_BYTES (512) at each 16-byte aligned address of the block ptr."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0;",
        "=r,l",
        [ptr.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _decode_kernel(
    weight_desc,
    x_desc,
    out_desc,
    extra_desc,
    extra_out_desc,
    weight_ptr,
    out_ptr,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    num_rows,
    num_cols,
    width,
    num_groups,
    NUM_SPLITS: tl.constexpr,
    SPLIT_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LATE: tl.constexpr,
    PDL: tl.constexpr,
):
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    # Neighbours in time share their weight rows through L2.
    start_n = tl.program_id(0) // num_row_blocks * (BLOCK_N + EXTRA_N)
    start_m = tl.program_id(0) % num_row_blocks * BLOCK_M
    split = tl.program_id(1)
    start_k = split * SPLIT_WIDTH
    if PDL:
        if PREFETCH > 0:
            # Weights do not come from the previous kernel: their way to L2 starts under its tail.
            _prefetch(weight_ptr, start_n, start_k, num_cols, width, BLOCK_N, PREFETCH)
            if EXTRA_N > 0:
                start = start_n + BLOCK_N
                _prefetch(weight_ptr, start, start_k, num_cols, width, EXTRA_N, PREFETCH)
        tl.extra.cuda.gdc_wait()
        if not LATE:
            tl.extra.cuda.gdc_launch_dependents()
    finished: tl.constexpr = NUM_SPLITS == 1
    row_scale, col_scale, bias = load_factors(
        start_n, start_m, row_scale_ptr, col_scale_ptr, bias_ptr, num_rows, num_cols,
        BLOCK_N, BLOCK_M, PER_CHANNEL and finished, HAS_BIAS and finished,
    )  # fmt: skip
    if BLOCK_SCALED:
        acc = scaled_split(
            weight_desc, x_desc, col_scale_ptr, row_scale_ptr, start_n, start_m, start_k,
            num_rows, num_groups, SPLIT_WIDTH, BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
    elif EXTRA_N == 0:
        acc = plain_split(
            weight_desc, x_desc, start_n, start_m, start_k,
            SPLIT_WIDTH, BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
    else:
        extra_n = start_n + BLOCK_N
        _, extra_scale, extra_bias = load_factors(
            extra_n, start_m, row_scale_ptr, col_scale_ptr, bias_ptr, num_rows, num_cols,
            EXTRA_N, BLOCK_M, PER_CHANNEL, HAS_BIAS,
        )  # fmt: skip
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        extra_acc = tl.zeros([EXTRA_N, BLOCK_M], dtype=tl.float32)
        for k in tl.range(start_k, start_k + SPLIT_WIDTH, BLOCK_K, num_stages=NUM_STAGES):
            x = x_desc.load([start_m, k])
            weight = weight_desc.load([start_n, k])
            extra = extra_desc.load([extra_n, k])
            acc = tl.dot(weight, x.T, acc)
            extra_acc = tl.dot(extra, x.T, extra_acc)
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    if finished:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        out = finish_block(acc, row_scale, col_scale, bias, PER_CHANNEL, HAS_BIAS, dtype)
        if EXTRA_N > 0:
            extra_out = finish_block(
                extra_acc, row_scale, extra_scale, extra_bias, PER_CHANNEL, HAS_BIAS, dtype
            )
            store_block(
                extra_out, extra_n, start_m, extra_out_desc, out_ptr, num_rows, num_cols, NUM_PIECES
            )
        store_block(out, start_n, start_m, out_desc, out_ptr, num_rows, num_cols, NUM_PIECES)
    else:
        partial_ptr = out_ptr + split.to(tl.int64) * num_rows * num_cols
        store_block(acc, start_n, start_m, out_desc, partial_ptr, num_rows, num_cols, 0)


@triton.jit
def _prefetch(
    weight_ptr, start_n, start_k, num_cols, width, NUM: tl.constexpr, PREFETCH: tl.constexpr
):
    """Asks L2 for the first PREFETCH pieces of NUM weight rows from start_n on, from k start_k."""
    step: tl.constexpr = _PREFETCH_BYTES // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    rows = tl.minimum(start_n + tl.arange(0, NUM), num_cols - 1).to(tl.int64) * width
    pieces = start_k + tl.arange(0, PREFETCH) * step
    prefetch_rows(weight_ptr + rows[:, None] + pieces[None, :], _PREFETCH_BYTES)


def launch_decode(
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    weight: Weight,
    tiles: Tiles,
    dtype: torch.dtype,
    *,
    pdl: bool,
) -> torch.Tensor | Product:
    """[num_rows, N] in dtype, or a Product where tiles have more than one split.

    rows [num_rows, K], row_scales [num_rows, num_groups] as the weight's format asks.
    """
    num_rows, width = rows.shape
    num_cols, splits = weight.values.shape[0], tiles.num_splits
    if splits == 1:
        out = rows.new_empty((num_rows, num_cols), dtype=dtype)
    else:
        out = rows.new_empty((splits, num_rows, num_cols), dtype=torch.float32)
    block_n = tiles.block_n + tiles.extra_n
    num_blocks = triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_cols, block_n)
    kernel: Any = _decode_kernel
    kernel[(num_blocks, splits)](
        *descriptors(weight, rows, tiles),
        out_descriptor(out, tiles, tiles.block_n),
        *extra_descriptors(weight, out, tiles),
        weight.values,
        out,
        *factors(weight, row_scales, out),
        num_rows,
        num_cols,
        width,
        weight.num_groups,
        EXTRA_N=tiles.extra_n,
        PREFETCH=tiles.prefetch,
        LATE=tiles.late == 1,
        **constants(weight, tiles, out, pdl=pdl),
    )
    return out if splits == 1 else _unreduced(out, row_scales, weight)


def _unreduced(partials: torch.Tensor, row_scales: torch.Tensor | None, weight: Weight) -> Product:
    """Sums of block-scaled weights have their scales in them."""
    if row_scales is None or weight.block_scaled:
        return Product(partials=partials, bias=weight.bias)
    return Product(
        partials=partials,
        row_scales=row_scales.view(-1),
        col_scales=weight.scales,
        bias=weight.bias,
    )
