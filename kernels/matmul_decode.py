"""Matrix product of few rows with a large weight, at the speed of the weight's bytes.

Owns the kernel whose MMA takes weight rows as M and tokens as N, so that a handful of tokens wastes
no tensor-core rows. K is cut into a fixed number of splits; with more than one the kernel leaves
partial sums to its consumer (kernels.product). Never chooses tiles.

Order of summation (the same in kernels.matmul_prefill): inside a split the tensor core's own
accumulator from the first to the last k. For e4m3 that is the fast accumulation of Hopper, whose
adder keeps about 14 bits: the relative error of a bf16 result (1.7e-3 with exact sums) is 2.1e-3 at
K 4096 and 3.1e-3 at K 12288 (measured; random operands; torch's `use_fast_accum` is the same).
Block-scaled weights move it to fp32 after every 128 of K. Splits are added in order in fp32.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.fp8_quant import GROUP
from kernels.matmul_launch import constants, descriptors, factors
from kernels.matmul_tiles import Tiles
from kernels.product import Product, finish
from kernels.weight import Weight

_GROUP = tl.constexpr(GROUP)
_PREFETCH_BYTES = tl.constexpr(512)


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
def promote(total, part, weight_scale, row_scale):
    """total + part * scales: how one K group of a block-scaled product enters the fp32 sum."""
    scale = tl.broadcast_to(weight_scale * row_scale, part.shape)
    return tl.fma(part, scale, total)


@triton.jit
def _decode_kernel(
    weight_desc,
    x_desc,
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
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    # Neighbours in time share their weight rows through L2.
    start_n = tl.program_id(0) // num_row_blocks * BLOCK_N
    start_m = tl.program_id(0) % num_row_blocks * BLOCK_M
    split = tl.program_id(1)
    start_k = split * SPLIT_WIDTH
    n = start_n + tl.arange(0, BLOCK_N)
    m = start_m + tl.arange(0, BLOCK_M)
    if PDL:
        if PREFETCH > 0:
            # Weights do not come from the previous kernel: their way to L2 starts under its tail.
            step: tl.constexpr = _PREFETCH_BYTES // (
                weight_ptr.dtype.element_ty.primitive_bitwidth // 8
            )
            rows = tl.minimum(n, num_cols - 1).to(tl.int64) * width
            prefetch_rows(
                weight_ptr + rows[:, None] + start_k + tl.arange(0, PREFETCH)[None, :] * step,
                _PREFETCH_BYTES,
            )
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if BLOCK_SCALED:
        weight_scale_ptr = col_scale_ptr + n // _GROUP * num_groups
        x_scale_ptr = row_scale_ptr + m * num_groups
        for k in tl.range(start_k, start_k + SPLIT_WIDTH, BLOCK_K, num_stages=NUM_STAGES):
            weight = weight_desc.load([start_n, k])
            x = x_desc.load([start_m, k])
            # Behind the last group the operands are zeros.
            group = tl.minimum(k // _GROUP, num_groups - 1)
            weight_scale = tl.load(weight_scale_ptr + group, mask=n < num_cols, other=0.0)
            x_scale = tl.load(x_scale_ptr + group, mask=m < num_rows, other=0.0)
            part = tl.dot(weight, x.T)
            acc = promote(acc, part, weight_scale[:, None], x_scale[None, :])
    else:
        for k in tl.range(start_k, start_k + SPLIT_WIDTH, BLOCK_K, num_stages=NUM_STAGES):
            weight = weight_desc.load([start_n, k])
            x = x_desc.load([start_m, k])
            acc = tl.dot(weight, x.T, acc)
    mask = (n[:, None] < num_cols) & (m[None, :] < num_rows)
    offsets = m[None, :].to(tl.int64) * num_cols + n[:, None]
    if NUM_SPLITS == 1:
        row_scale = 1.0
        col_scale = 1.0
        bias = acc
        if PER_CHANNEL:
            row_scale = tl.load(row_scale_ptr + m, mask=m < num_rows, other=0.0)[None, :]
            col_scale = tl.load(col_scale_ptr + n, mask=n < num_cols, other=0.0)[:, None]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + n, mask=n < num_cols, other=0.0)[:, None]
        dtype = out_ptr.dtype.element_ty
        out = finish(acc, row_scale, col_scale, bias, PER_CHANNEL, PER_CHANNEL, HAS_BIAS, dtype)
        tl.store(out_ptr + offsets, out, mask=mask)
    else:
        partial_ptr = out_ptr + split.to(tl.int64) * num_rows * num_cols
        tl.store(partial_ptr + offsets, acc, mask=mask)


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
    num_blocks = triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_cols, tiles.block_n)
    kernel: Any = _decode_kernel
    kernel[(num_blocks, splits)](
        *descriptors(weight, rows, tiles),
        weight.values,
        out,
        *factors(weight, row_scales, out),
        num_rows,
        num_cols,
        width,
        weight.num_groups,
        PREFETCH=tiles.prefetch,
        **constants(weight, tiles, pdl=pdl),
    )
    if splits == 1:
        return out
    if row_scales is None or weight.block_scaled:
        return Product(partials=out, bias=weight.bias)
    return Product(
        partials=out, row_scales=row_scales.view(-1), col_scales=weight.scales, bias=weight.bias
    )
