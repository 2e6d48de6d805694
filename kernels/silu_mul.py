"""SiLU(gate) * up over a fused projection (Shazeer, 2020), and the FP8 quantisation behind it."""

# Triton's jit is beyond the type checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

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

# Values per program where a row need not be seen whole.
_TILE = 2048


@overload
def silu_mul(
    gate_up: torch.Tensor | Product,
    *,
    quantise: None = None,
    dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> torch.Tensor: ...
@overload
def silu_mul(
    gate_up: torch.Tensor | Product,
    *,
    quantise: Quantise | None,
    dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> torch.Tensor | Fp8Rows: ...
def silu_mul(
    gate_up: torch.Tensor | Product,
    *,
    quantise: Quantise | None = None,
    dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> torch.Tensor | Fp8Rows:
    """gate_up [num_tokens, 2 * width], gate first -> [num_tokens, width], in fp32, rounded once.

    A Product is finished and rounded to dtype (then required, else a ValueError) first, so that its
    bits are those of the finished tensor. quantise: the rounded result as FP8 with a scale per
    token or per 128 values. pdl: start under the previous kernel.
    """
    if isinstance(gate_up, Product):
        if dtype is None:
            raise ValueError("dtype: None; a Product needs the dtype that it is rounded to")
        if not gate_up.partials.is_cuda:
            gate_up = gate_up.sum(dtype)
    if isinstance(gate_up, Product) or gate_up.is_cuda:
        return _launch_triton(gate_up, quantise, dtype, pdl=pdl)
    return quantise_if(_silu_mul_torch(gate_up), quantise)


def _silu_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """torch's fp32 silu and sigmoid on CPU give an element other bits in a vector's tail; exp and
    division do not (measured, torch 2.13, AVX-512), so SiLU is spelled out.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.float()
    denominator = torch.exp(-gate).add_(1.0)
    return torch.div(gate, denominator, out=denominator).mul_(up).to(gate_up.dtype)


@triton.jit
def _silu_mul_kernel(
    x_ptr,
    stride_split,
    stride_row,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    out_ptr,
    scale_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COL_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.max_contiguous(tl.arange(0, BLOCK), 8)
    mask = cols < WIDTH
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = load_product(
        x_ptr, row, cols, mask, stride_split, stride_row, row_scale_ptr, col_scale_ptr, bias_ptr,
        SPLITS, HAS_ROW_SCALE, HAS_COL_SCALE, HAS_BIAS, DTYPE,
    )  # fmt: skip
    up = load_product(
        x_ptr, row, cols + WIDTH, mask, stride_split, stride_row, row_scale_ptr, col_scale_ptr,
        bias_ptr, SPLITS, HAS_ROW_SCALE, HAS_COL_SCALE, HAS_BIAS, DTYPE,
    )  # fmt: skip
    gate = gate.to(tl.float32)
    fed = (gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)).to(DTYPE)
    # Behind the last column gate is 0, and so is 0 / 2 * 0.
    store_row(fed, out_ptr, scale_ptr, row, start, WIDTH, BLOCK, GROUP_SIZE)


def _launch_triton(
    gate_up: torch.Tensor | Product,
    quantise: Quantise | None,
    dtype: torch.dtype | None,
    *,
    warps: int | None = None,
    pdl: bool = False,
) -> torch.Tensor | Fp8Rows:
    if isinstance(gate_up, torch.Tensor):
        gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    arguments, flags = product_arguments(gate_up)
    source = arguments[0]
    assert isinstance(source, torch.Tensor)
    num_rows, width = source.shape[-2], source.shape[-1] // 2
    dtype = source.dtype if isinstance(gate_up, torch.Tensor) else dtype
    like = torch.empty(0, dtype=dtype, device=source.device)
    out, values, scales = empty_rows(like, num_rows, width, quantise)
    block = max(GROUP, triton.next_power_of_2(width))
    if quantise != "token":
        block = min(block, _TILE)
    if num_rows:
        _silu_mul_kernel[(num_rows, triton.cdiv(width, block))](
            *arguments,
            values,
            scales,
            WIDTH=width,
            BLOCK=block,
            GROUP_SIZE={None: 0, "token": block, "group": GROUP}[quantise],
            DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
            num_warps=warps or min(16, max(1, block // 512)),
            **flags,
            **launch_options(pdl=pdl),
        )
    return out
