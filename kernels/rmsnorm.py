"""Root mean square normalisation (Zhang and Sennrich, 2019), the residual sum before it, and the
FP8 quantisation behind it.

Owns the order in which a row's squares are added. The Triton kernel reads a row once, keeps it in
registers, and adds in one fixed binary tree: its bits depend neither on the number of rows nor on
the number of warps.
"""

# Triton's jit is beyond the type checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from bisect import bisect_left
from typing import overload

import torch
import triton
import triton.language as tl

from kernels.fp8_quant import (
    GROUP,
    Fp8Rows,
    Quantise,
    empty_rows,
    launch_options,
    quantise_if,
    store_row,
)
from kernels.product import Product, load_product, product_arguments

MAX_WARPS = 32
# Rows up to which a column of _WARPS holds; more rows: the last one.
_ROWS = (8, 64, 512)
# Width (a power of two, rounded up) to warps per row, measured on an H100.
_WARPS = {
    1024: (4, 4, 4, 4),
    2048: (4, 8, 4, 4),
    4096: (8, 8, 8, 4),
    8192: (8, 8, 16, 8),
    16384: (16, 16, 16, 16),
}


def default_warps(width: int, rows: int) -> int:
    """Warps for one row of `width` when there are `rows` of them; from the tuned table."""
    rounded = max(min(_WARPS), min(max(_WARPS), triton.next_power_of_2(width)))
    return _WARPS[rounded][bisect_left(_ROWS, rows)]


def check_warps(warps: int) -> int:
    """warps, or a ValueError if RMSNORM_WARPS may not be that."""
    if not 1 <= warps <= MAX_WARPS or warps & (warps - 1):
        raise ValueError(f"RMSNORM_WARPS: {warps}; a power of two from 1 to {MAX_WARPS} is needed")
    return warps


@overload
def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    quantise: None = None,
    warps: int | None = None,
    pdl: bool = False,
) -> torch.Tensor: ...
@overload
def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    quantise: Quantise | None,
    warps: int | None = None,
    pdl: bool = False,
) -> torch.Tensor | Fp8Rows: ...
def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    quantise: Quantise | None = None,
    warps: int | None = None,
    pdl: bool = False,
) -> torch.Tensor | Fp8Rows:
    """x [..., width] scaled to unit mean square in fp32, times weight [width]; x's dtype.

    weight may also be [num_heads, width] for x [num_tokens, num_heads, width]. quantise, for x
    [num_rows, width] only: the rounded result as FP8 with a scale per token or per 128 values.
    warps overrides the table on a GPU (see `check_warps`); pdl: start under the previous kernel.
    """
    if warps is not None:
        check_warps(warps)
    if quantise is not None and x.dim() != 2:
        raise ValueError(f"x: shape {tuple(x.shape)}; only [num_rows, width] can be quantised")
    if x.is_cuda:
        return _launch_triton(x, None, weight, eps, quantise, warps, pdl=pdl)[0]
    return quantise_if(_rmsnorm_torch(x, weight, eps), quantise)


@overload
def add_rmsnorm(
    x: torch.Tensor | Product,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    quantise: None = None,
    warps: int | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def add_rmsnorm(
    x: torch.Tensor | Product,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    quantise: Quantise | None,
    warps: int | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor | Fp8Rows, torch.Tensor]: ...
def add_rmsnorm(
    x: torch.Tensor | Product,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    quantise: Quantise | None = None,
    warps: int | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor | Fp8Rows, torch.Tensor]:
    """(rmsnorm(x + residual), x + residual), both [num_rows, width]; residual's dtype is the sum's.

    x may be a Product: it is finished and rounded to residual's dtype first, so that its bits are
    those of the finished tensor. quantise, warps, pdl: as for `rmsnorm`.
    """
    if warps is not None:
        check_warps(warps)
    if residual.is_cuda:
        out, total = _launch_triton(x, residual, weight, eps, quantise, warps, pdl=pdl)
        assert total is not None
        return out, total
    total = (x.sum(residual.dtype) if isinstance(x, Product) else x) + residual
    return quantise_if(_rmsnorm_torch(total, weight, eps), quantise), total


def _rmsnorm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


@triton.jit
def pairwise_sum(x, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """x [SIZE] fp32 -> [SIZE >> LEVELS]: sums of 2 ** LEVELS neighbours, as one binary tree.

    Every addition is written out with two operands, so no layout can change a bit.
    """
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(x, [SIZE >> (level + 1), 2])
        # Eight neighbours lie in one thread and 256 in one warp: there a sum of two is a shuffle.
        # Above, split brings the few sums that are left to every thread at once.
        if level < 3 or level >= 8:
            left, right = tl.split(pairs)
            x = left + right
        else:
            x = tl.sum(pairs, axis=1)
    return x


@triton.jit
def _rmsnorm_kernel(
    x_ptr,
    stride_split,
    stride_row,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    total_ptr,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COL_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.max_contiguous(tl.arange(0, BLOCK), 8)
    mask = cols < WIDTH
    # No kernel writes weights: they come while the previous one still runs.
    weight = tl.load(weight_ptr + (row % NUM_WEIGHTS) * WIDTH + cols, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * WIDTH + cols, mask=mask, other=0.0)
    x = load_product(
        x_ptr,
        row,
        cols,
        mask,
        stride_split,
        stride_row,
        row_scale_ptr,
        col_scale_ptr,
        bias_ptr,
        SPLITS,
        HAS_ROW_SCALE,
        HAS_COL_SCALE,
        HAS_BIAS,
        dtype,
    )
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * WIDTH + cols, x, mask=mask)
    wide = x.to(tl.float32)
    square = pairwise_sum(wide * wide, BLOCK, LEVELS)  # [1]
    normed = (wide * tl.rsqrt(square * (1.0 / WIDTH) + eps)).to(dtype)
    normed = (normed.to(tl.float32) * weight.to(tl.float32)).to(dtype)
    store_row(normed, out_ptr, scale_ptr, row, 0, WIDTH, BLOCK, GROUP_SIZE)


def _rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x as [num_rows, width] with neighbours in memory along a row."""
    x = x.reshape(-1, width)
    return x if x.stride(1) == 1 else x.contiguous()


def _launch_triton(
    x: torch.Tensor | Product,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    quantise: Quantise | None,
    warps: int | None,
    *,
    pdl: bool = False,
) -> tuple[torch.Tensor | Fp8Rows, torch.Tensor | None]:
    width = weight.shape[-1]
    shape = (x.partials[0] if isinstance(x, Product) else x).shape
    num_rows = shape.numel() // width
    arguments, flags = product_arguments(x if isinstance(x, Product) else _rows(x, width))
    like = arguments[0] if residual is None else residual.contiguous()
    assert isinstance(like, torch.Tensor)
    out, values, scales = empty_rows(like, num_rows, width, quantise)
    total = None if residual is None else torch.empty_like(like)
    block = max(GROUP, triton.next_power_of_2(width))
    if num_rows:
        _rmsnorm_kernel[(num_rows,)](
            *arguments,
            like,
            weight.contiguous(),
            values,
            scales,
            like if total is None else total,
            eps,
            WIDTH=width,
            BLOCK=block,
            LEVELS=block.bit_length() - 1,
            NUM_WEIGHTS=weight.numel() // width,
            GROUP_SIZE={None: 0, "token": block, "group": GROUP}[quantise],
            HAS_RESIDUAL=residual is not None,
            num_warps=warps or default_warps(width, num_rows),
            **flags,
            **launch_options(pdl=pdl),
        )
    return out if isinstance(out, Fp8Rows) else out.view(shape), total
