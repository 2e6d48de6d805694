"""How a block of a matrix product leaves the accumulators of either kernel.

Owns the way of sums [weight rows, tokens] to memory, finished by kernels.product: turned on their
way through shared memory to the copy engine, or straight from registers. Never launches anything.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from kernels.product import finish


@triton.jit
def _halves(out):
    """out [R, C] as two [R, C / 2], left and right."""
    return tl.split(tl.permute(tl.reshape(out, (out.shape[0], 2, out.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def load_factors(
    start_n,
    start_m,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    num_rows,
    num_cols,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """(row scales [BLOCK_M], column scales [BLOCK_N], bias [BLOCK_N]) of a block; 1.0 for none.

    Asked for before the sums, their way from memory is hidden behind them.
    """
    row_scale = 1.0
    col_scale = 1.0
    bias = 1.0
    m = start_m + tl.arange(0, BLOCK_M)
    n = start_n + tl.arange(0, BLOCK_N)
    if PER_CHANNEL:
        row_scale = tl.load(row_scale_ptr + m, mask=m < num_rows, other=0.0)
        col_scale = tl.load(col_scale_ptr + n, mask=n < num_cols, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < num_cols, other=0.0)
    return row_scale, col_scale, bias


@triton.jit
def finish_block(
    acc,
    row_scale,
    col_scale,
    bias,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    dtype: tl.constexpr,
):
    """acc [weight rows, tokens] with what `load_factors` gave, in dtype."""
    if PER_CHANNEL:
        row_scale = row_scale[None, :]
        col_scale = col_scale[:, None]
    bias = bias[:, None] if HAS_BIAS else acc
    return finish(acc, row_scale, col_scale, bias, PER_CHANNEL, PER_CHANNEL, HAS_BIAS, dtype)


@triton.jit
def store_block(
    out, start_n, start_m, out_desc, out_ptr, num_rows, num_cols, NUM_PIECES: tl.constexpr
):
    """Stores out [weight rows, tokens] to [num_rows, num_cols] at (start_m, start_n).

    NUM_PIECES: shares of the tokens that pass through shared memory one after the other, as
    out_desc's blocks say; 0: straight from registers.
    """
    if NUM_PIECES == 0:
        n = start_n + tl.arange(0, out.shape[0])
        m = start_m + tl.arange(0, out.shape[1])
        mask = (n[:, None] < num_cols) & (m[None, :] < num_rows)
        tl.store(out_ptr + m[None, :].to(tl.int64) * num_cols + n[:, None], out, mask=mask)
    elif NUM_PIECES == 1:
        out_desc.store([start_m, start_n], out.T)
    else:
        middle: tl.constexpr = out.shape[1] // 2
        half: tl.constexpr = NUM_PIECES // 2
        left, right = _halves(out)
        store_block(left, start_n, start_m, out_desc, out_ptr, num_rows, num_cols, half)
        store_block(right, start_n, start_m + middle, out_desc, out_ptr, num_rows, num_cols, half)
