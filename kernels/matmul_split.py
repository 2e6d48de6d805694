"""One split of K of one block of a matrix product, for both product kernels.

Owns the order of summation inside a split: the tensor core's own, from the first k to the last; for
block-scaled weights in fp32 group by group. Never stores and never launches anything.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from kernels.fp8_quant import GROUP

_GROUP = tl.constexpr(GROUP)


@triton.jit
def plain_split(
    weight_desc,
    x_desc,
    start_n,
    start_m,
    start_k,
    SPLIT_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Sum [BLOCK_N weight rows, BLOCK_M tokens] over SPLIT_WIDTH of K from start_k on, fp32."""
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in tl.range(start_k, start_k + SPLIT_WIDTH, BLOCK_K, num_stages=NUM_STAGES):
        weight = weight_desc.load([start_n, k])
        x = x_desc.load([start_m, k])
        acc = tl.dot(weight, x.T, acc)
    return acc


@triton.jit
def scaled_split(
    weight_desc,
    x_desc,
    weight_scale_ptr,
    row_scale_ptr,
    start_n,
    start_m,
    start_k,
    num_rows,
    num_groups,
    SPLIT_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The same with a scale per 128 x 128 of the weight and 128 of a row: [ceil(N / 128),
    num_groups] and [num_rows, num_groups] fp32. BLOCK_K is a group, BLOCK_N part of one.
    """
    tl.static_assert(BLOCK_N <= _GROUP and BLOCK_K == _GROUP)
    m = start_m + tl.arange(0, BLOCK_M)
    x_scale_ptr = row_scale_ptr + m * num_groups
    block_scale_ptr = weight_scale_ptr + start_n // _GROUP * num_groups
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in tl.range(start_k, start_k + SPLIT_WIDTH, BLOCK_K, num_stages=NUM_STAGES):
        weight = weight_desc.load([start_n, k])
        x = x_desc.load([start_m, k])
        # Behind the last group the operands are zeros.
        group = tl.minimum(k // _GROUP, num_groups - 1)
        x_scale = tl.load(x_scale_ptr + group, mask=m < num_rows, other=0.0)
        scale = tl.load(block_scale_ptr + group) * x_scale
        acc = tl.fma(tl.dot(weight, x.T), tl.broadcast_to(scale[None, :], acc.shape), acc)
    return acc
