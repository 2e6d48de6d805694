"""Matrix product of many rows with a weight, at the speed of the tensor cores.

Owns the kernel for more rows than kernels.matmul_decode takes, with the same order of summation and
the same bits: splits of K are added in registers, in order. Never chooses tiles.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fp8_quant import GROUP
from kernels.matmul_decode import promote
from kernels.matmul_launch import constants, descriptors, factors
from kernels.matmul_tiles import Tiles
from kernels.product import finish
from kernels.weight import Weight

_GROUP = tl.constexpr(GROUP)
_ROW_GROUP = 8
"""Row blocks that walk along the weight together, so that both stay in L2."""


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere (the interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _store_columns(
    acc,
    start_m,
    start_n,
    out_desc,
    out_ptr,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    num_rows,
    num_cols,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BULK_STORE: tl.constexpr,
):
    """Finishes and stores acc [BLOCK_M, columns] at (start_m, start_n)."""
    m = start_m + tl.arange(0, acc.shape[0])
    n = start_n + tl.arange(0, acc.shape[1])
    row_scale = 1.0
    col_scale = 1.0
    bias = acc
    if PER_CHANNEL:
        row_scale = tl.load(row_scale_ptr + m, mask=m < num_rows, other=0.0)[:, None]
        col_scale = tl.load(col_scale_ptr + n, mask=n < num_cols, other=0.0)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < num_cols, other=0.0)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out = finish(acc, row_scale, col_scale, bias, PER_CHANNEL, PER_CHANNEL, HAS_BIAS, dtype)
    if BULK_STORE:
        out_desc.store([start_m, start_n], out)
    else:
        mask = (m[:, None] < num_rows) & (n[None, :] < num_cols)
        tl.store(out_ptr + m[:, None].to(tl.int64) * num_cols + n[None, :], out, mask=mask)


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
    ROW_GROUP: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BULK_STORE: tl.constexpr,
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
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if BLOCK_SCALED:
            m = start_m + tl.arange(0, BLOCK_M)
            n = start_n + tl.arange(0, BLOCK_N)
            weight_scale_ptr = col_scale_ptr + n // _GROUP * num_groups
            x_scale_ptr = row_scale_ptr + m * num_groups
            for split in tl.static_range(NUM_SPLITS):
                start_k = split * SPLIT_WIDTH
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                for k in tl.range(start_k, start_k + SPLIT_WIDTH, BLOCK_K, num_stages=NUM_STAGES):
                    x = x_desc.load([start_m, k])
                    weight = weight_desc.load([start_n, k])
                    # Behind the last group the operands are zeros.
                    group = tl.minimum(k // _GROUP, num_groups - 1)
                    weight_scale = tl.load(weight_scale_ptr + group, mask=n < num_cols, other=0.0)
                    x_scale = tl.load(x_scale_ptr + group, mask=m < num_rows, other=0.0)
                    part = tl.dot(x, weight.T)
                    acc = promote(acc, part, weight_scale[None, :], x_scale[:, None])
                total = total + acc
        elif NUM_SPLITS == 1:
            for k in tl.range(0, SPLIT_WIDTH, BLOCK_K, num_stages=NUM_STAGES):
                x = x_desc.load([start_m, k])
                weight = weight_desc.load([start_n, k])
                total = tl.dot(x, weight.T, total)
        else:
            for split in tl.static_range(NUM_SPLITS):
                start_k = split * SPLIT_WIDTH
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                for k in tl.range(start_k, start_k + SPLIT_WIDTH, BLOCK_K, num_stages=NUM_STAGES):
                    x = x_desc.load([start_m, k])
                    weight = weight_desc.load([start_n, k])
                    acc = tl.dot(x, weight.T, acc)
                total = total + acc
        # In halves, which need half the shared memory on their way out.
        halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _store_columns(
            left,
            start_m,
            start_n,
            out_desc,
            out_ptr,
            row_scale_ptr,
            col_scale_ptr,
            bias_ptr,
            num_rows,
            num_cols,
            PER_CHANNEL,
            HAS_BIAS,
            BULK_STORE,
        )
        _store_columns(
            right,
            start_m,
            start_n + BLOCK_N // 2,
            out_desc,
            out_ptr,
            row_scale_ptr,
            col_scale_ptr,
            bias_ptr,
            num_rows,
            num_cols,
            PER_CHANNEL,
            HAS_BIAS,
            BULK_STORE,
        )


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
    num_programs = min(num_blocks, _num_multiprocessors(rows.device)) if persistent else num_blocks
    bulk_store = num_cols * dtype.itemsize % 16 == 0
    half = [tiles.block_m, tiles.block_n // 2]
    kernel: Any = _prefill_kernel
    kernel[(num_programs,)](
        *descriptors(weight, rows, tiles),
        TensorDescriptor.from_tensor(out, half) if bulk_store else out,
        out,
        *factors(weight, row_scales, out),
        num_rows,
        num_cols,
        weight.num_groups,
        ROW_GROUP=_ROW_GROUP,
        NUM_PROGRAMS=num_programs if persistent else 2**30,
        BULK_STORE=bulk_store,
        **constants(weight, tiles, pdl=pdl),
    )
    return out
