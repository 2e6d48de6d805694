"""The unreduced result of a matrix product split along K, and how its consumer finishes it.

Owns the order in which splits are added, scales applied and the result rounded: every kernel that
ends a matrix product calls `finish`, every kernel that reads one calls `load_product`, so a value
has the same bits whether the product or its consumer finished it. Never launches anything.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What a decode product leaves to the next kernel; value [M, N], see `sum`.

    partials: [num_splits, M, N] fp32, contiguous; row_scales [M], col_scales [N] fp32; bias [N].
    """

    partials: torch.Tensor
    row_scales: torch.Tensor | None = None
    col_scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def sum(self, dtype: torch.dtype) -> torch.Tensor:
        """Twin of `load_product`: [M, N] in dtype."""
        total = self.partials[0]
        for partial in self.partials[1:]:
            total = total + partial
        factors = []
        if self.row_scales is not None:
            factors.append(self.row_scales[:, None])
        if self.col_scales is not None:
            factors.append(self.col_scales[None, :])
        if self.bias is None:
            for factor in factors:
                total = total * factor
            return total.to(dtype)
        for factor in factors[:-1]:
            total = total * factor
        if not factors:
            return (total + self.bias.float()).to(dtype)
        # One rounding, as the kernel's fused multiply-add: a product of two fp32 is exact in fp64.
        fused = total.double() * factors[-1].double() + self.bias.double()
        return fused.float().to(dtype)


def product_arguments(
    x: torch.Tensor | Product,
) -> tuple[tuple[torch.Tensor | int, ...], dict[str, bool | int]]:
    """Arguments of a kernel that reads x by `load_product`, for a finished x [M, N], too.

    Returns (ptr, stride_split, stride_row, row_scale_ptr, col_scale_ptr, bias_ptr) and the
    constexprs SPLITS, HAS_ROW_SCALE, HAS_COL_SCALE, HAS_BIAS. Absent pointers repeat ptr.
    """
    if isinstance(x, torch.Tensor):
        flags: dict[str, bool | int] = {"SPLITS": 0}
        flags |= {"HAS_ROW_SCALE": False, "HAS_COL_SCALE": False, "HAS_BIAS": False}
        return (x, 0, x.stride(0), x, x, x), flags
    partials = x.partials
    flags = {
        "SPLITS": partials.shape[0],
        "HAS_ROW_SCALE": x.row_scales is not None,
        "HAS_COL_SCALE": x.col_scales is not None,
        "HAS_BIAS": x.bias is not None,
    }
    extras = (x.row_scales, x.col_scales, x.bias)
    pointers = tuple(partials if extra is None else extra for extra in extras)
    return (partials, partials.stride(0), partials.stride(1), *pointers), flags


@triton.jit
def finish(
    total,
    row_scale,
    col_scale,
    bias,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COL_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    dtype: tl.constexpr,
):
    """(total * row_scale) * col_scale + bias, rounded once to dtype; operands must broadcast.

    The last product and the bias are one fused multiply-add, written out, so that no compiler
    decides it differently in two kernels.
    """
    if HAS_BIAS:
        addend = tl.broadcast_to(bias.to(tl.float32), total.shape)
        if HAS_COL_SCALE:
            if HAS_ROW_SCALE:
                total = total * row_scale
            total = tl.fma(total, tl.broadcast_to(col_scale, total.shape), addend)
        elif HAS_ROW_SCALE:
            total = tl.fma(total, tl.broadcast_to(row_scale, total.shape), addend)
        else:
            total = total + addend
    else:
        if HAS_ROW_SCALE:
            total = total * row_scale
        if HAS_COL_SCALE:
            total = total * col_scale
    return total.to(dtype)


@triton.jit
def load_product(
    ptr,
    row,
    cols,
    mask,
    stride_split,
    stride_row,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    SPLITS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COL_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Values of a Product at (row, cols) in dtype; 0 where mask is false and there is no bias.

    row: one row or a block of rows that broadcasts against cols, all below M. mask has the shape of
    row and cols together. SPLITS 0: ptr is a finished tensor of dtype. Arguments come from
    `product_arguments`.
    """
    # A split can lie more than 2**31 elements behind the first.
    offsets = row.to(tl.int64) * stride_row + cols
    total = tl.load(ptr + offsets, mask=mask, other=0.0)
    if SPLITS > 0:
        for split in tl.static_range(1, SPLITS):
            partial_ptr = ptr + stride_split.to(tl.int64) * split
            total = total + tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        row_scale = 1.0
        if HAS_ROW_SCALE:
            row_scale = tl.broadcast_to(tl.load(row_scale_ptr + row), total.shape)
        column_offsets = cols + row * 0
        col_scale = 1.0
        if HAS_COL_SCALE:
            col_scale = tl.load(col_scale_ptr + column_offsets, mask=mask, other=0.0)
        bias = total
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column_offsets, mask=mask, other=0.0)
        total = finish(
            total, row_scale, col_scale, bias, HAS_ROW_SCALE, HAS_COL_SCALE, HAS_BIAS, dtype
        )
    return total
