"""Matrix product of many rows with a weight, at the speed of the tensor cores.

Owns the kernel whose programs go from block to block, with the order of summation and the bits of
kernels.matmul_decode: splits of K are added in registers, in order. Never chooses tiles.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.matmul_launch import constants, descriptors, factors, out_descriptor
from kernels.matmul_split import plain_split, scaled_split
from kernels.matmul_store import finish_block, load_factors, store_block
from kernels.matmul_tiles import Tiles
from kernels.weight import Weight

_ROW_GROUP = 16
"""Row blocks that walk along the weight together, so that both stay in L2."""
_ENDLESS = 2**30
"""Programs, where every block has its own."""


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere (the interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _prefill_kernel(
    weight_desc,
    x_desc,
    out_desc,
    out_ptr,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    num_rows,
    num_cols,
    num_groups,
    NUM_SPLITS: tl.constexpr,
    SPLIT_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    ROW_GROUP: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    num_blocks = num_row_blocks * tl.cdiv(num_cols, BLOCK_N)
    num_in_group = ROW_GROUP * tl.cdiv(num_cols, BLOCK_N)
    # One loop of all blocks and all of K, where it can be: the next block's first loads then start
    # under this one's end.
    for block in tl.range(
        tl.program_id(0), num_blocks, NUM_PROGRAMS, flatten=NUM_SPLITS == 1 and not BLOCK_SCALED
    ):
        first = block // num_in_group * ROW_GROUP
        num_together = tl.minimum(num_row_blocks - first, ROW_GROUP)
        start_m = (first + block % num_in_group % num_together) * BLOCK_M
        start_n = block % num_in_group // num_together * BLOCK_N
        total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if BLOCK_SCALED:
            for split in tl.static_range(NUM_SPLITS):
                total += scaled_split(
                    weight_desc, x_desc, col_scale_ptr, row_scale_ptr,
                    start_n, start_m, split * SPLIT_WIDTH, num_rows, num_groups,
                    SPLIT_WIDTH, BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES,
                )  # fmt: skip
        elif NUM_SPLITS == 1:
            for k in tl.range(0, SPLIT_WIDTH, BLOCK_K, num_stages=NUM_STAGES):
                x = x_desc.load([start_m, k])
                weight = weight_desc.load([start_n, k])
                total = tl.dot(weight, x.T, total)
        else:
            for split in tl.static_range(NUM_SPLITS):
                total += plain_split(
                    weight_desc, x_desc, start_n, start_m, split * SPLIT_WIDTH,
                    SPLIT_WIDTH, BLOCK_N, BLOCK_M, BLOCK_K, NUM_STAGES,
                )  # fmt: skip
        # Behind the sums: carried through the one loop, they would spill.
        row_scale, col_scale, bias = load_factors(
            start_n, start_m, row_scale_ptr, col_scale_ptr, bias_ptr, num_rows, num_cols,
            BLOCK_N, BLOCK_M, PER_CHANNEL, HAS_BIAS,
        )  # fmt: skip
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        out = finish_block(total, row_scale, col_scale, bias, PER_CHANNEL, HAS_BIAS, dtype)
        store_block(out, start_n, start_m, out_desc, out_ptr, num_rows, num_cols, NUM_PIECES)


def launch_prefill(
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    weight: Weight,
    tiles: Tiles,
    dtype: torch.dtype,
    *,
    pdl: bool,
) -> torch.Tensor:
    """[num_rows, N] in dtype.

    rows [num_rows, K], row_scales [num_rows, num_groups] as the weight's format asks.
    """
    num_rows, num_cols = rows.shape[0], weight.values.shape[0]
    out = rows.new_empty((num_rows, num_cols), dtype=dtype)
    num_blocks = triton.cdiv(num_rows, tiles.block_m) * triton.cdiv(num_cols, tiles.block_n)
    # Without the flat loop nothing is gained by fewer programs than blocks.
    persistent = tiles.num_splits == 1 and not weight.block_scaled
    # A constant of the kernel: not the number of blocks, which follows the number of rows.
    num_programs = _num_multiprocessors(rows.device) if persistent else _ENDLESS
    kernel: Any = _prefill_kernel
    kernel[(min(num_programs, num_blocks),)](
        *descriptors(weight, rows, tiles),
        out_descriptor(out, tiles, tiles.block_n),
        out,
        *factors(weight, row_scales, out),
        num_rows,
        num_cols,
        weight.num_groups,
        ROW_GROUP=_ROW_GROUP,
        NUM_PROGRAMS=num_programs,
        **constants(weight, tiles, out, pdl=pdl),
    )
    return out
