"""An unreduced product: its consumer's helper and its torch twin finish it to the same values."""

# Triton types its language for the compiler, not for a checker.
# pyright: reportCallIssue=false

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from kernels.product import Product, load_product, product_arguments

# The interpreter truncates where a GPU rounds to bf16.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _copy_kernel(
    out_ptr,
    ptr,
    stride_split,
    stride_row,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    num_cols,
    SPLITS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COL_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < num_cols
    value = load_product(
        ptr,
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
        out_ptr.dtype.element_ty,
    )
    tl.store(out_ptr + row * num_cols + cols, value, mask=mask)


def _copy(x: torch.Tensor | Product, shape: tuple[int, int]) -> torch.Tensor:
    out = torch.full(shape, float("nan"), dtype=DTYPE, device=DEVICE)
    pointers, flags = product_arguments(x)
    _copy_kernel[(shape[0],)](out, *pointers, shape[1], **flags, BLOCK=128)
    return out


def _product(num_splits: int, rows: bool, cols: bool, bias: bool) -> Product:
    return Product(
        partials=torch.randn(num_splits, 3, 100, device=DEVICE),
        row_scales=torch.rand(3, device=DEVICE) if rows else None,
        col_scales=torch.rand(100, device=DEVICE) if cols else None,
        bias=torch.randn(100, device=DEVICE).to(DTYPE) if bias else None,
    )


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("extras", list(itertools.product((False, True), repeat=3)), ids=str)
def test_the_helper_gives_the_bits_of_the_twin(
    num_splits: int, extras: tuple[bool, bool, bool]
) -> None:
    product = _product(num_splits, *extras)
    assert torch.equal(_copy(product, (3, 100)), product.sum(DTYPE))


def test_a_finished_tensor_is_read_as_it_is() -> None:
    x = torch.randn(3, 100, device=DEVICE).to(DTYPE)
    assert torch.equal(_copy(x, (3, 100)), x)
