"""Dynamic FP8 (e4m3) quantisation of activations: one scale per token, or per 128 of its values.

Owns the rounding that every fused quantisation shares: amax and products in fp32, scale = amax *
(1/448), stored = rounded(x * (448 / amax)), the division correctly rounded. Never looks at a
second row.
"""

# Triton's jit is beyond the type checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
GROUP = 128
"""Values per scale of the block-scaled format (DeepSeek-V3 and Qwen3 FP8 checkpoints)."""
MIN_AMAX = 1e-12
"""A row of zeros gets a finite scale."""

Quantise = Literal["token", "group"]
"""One scale per token, or one per GROUP values of it."""

_MAX = tl.constexpr(FP8_MAX)
_MIN_AMAX = tl.constexpr(MIN_AMAX)
_GROUP_TILE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Rows:
    """values [num_rows, width] e4m3, contiguous; scales [num_rows, num_groups] fp32, contiguous.

    x = values * scales; num_groups is 1 (per token) or ceil(width / GROUP).
    """

    values: torch.Tensor
    scales: torch.Tensor

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """[num_rows, width] in dtype."""
        width, num_groups = self.values.shape[1], self.scales.shape[1]
        group = width if num_groups == 1 else GROUP
        scales = self.scales.repeat_interleave(group, dim=1)[:, :width]
        return (self.values.float() * scales).to(dtype)


def quantise(x: torch.Tensor, group: int | None = None, *, pdl: bool = False) -> Fp8Rows:
    """x [num_rows, width] with one scale per row, or one per `group` (GROUP) values of a row.

    Any other group, or x of another rank, is a ValueError. pdl: start under the previous kernel.
    """
    if group not in (None, GROUP):
        raise ValueError(f"group: {group}; None or {GROUP}")
    if x.dim() != 2:
        raise ValueError(f"x: shape {tuple(x.shape)}; [num_rows, width] is needed")
    return _launch_triton(x, group, pdl=pdl) if x.is_cuda else _quantise_torch(x, group)


def quantise_if(normed: torch.Tensor, kind: Quantise | None) -> torch.Tensor | Fp8Rows:
    """The last step of a fused quantisation's twin."""
    if kind is None:
        return normed
    return _quantise_torch(normed, GROUP if kind == "group" else None)


def empty_rows(
    like: torch.Tensor, num_rows: int, width: int, kind: Quantise | None
) -> tuple[torch.Tensor | Fp8Rows, torch.Tensor, torch.Tensor]:
    """(result, its values, its scales) for a kernel to fill, in like's dtype or quantised.

    Without scales their place is taken by the values: a kernel needs some pointer.
    """
    if kind is None:
        out = torch.empty((num_rows, width), dtype=like.dtype, device=like.device)
        return out, out, out
    num_groups = 1 if kind == "token" else -(-width // GROUP)
    values = torch.empty((num_rows, width), dtype=FP8, device=like.device)
    scales = torch.empty((num_rows, num_groups), dtype=torch.float32, device=like.device)
    return Fp8Rows(values=values, scales=scales), values, scales


def launch_options(*, pdl: bool) -> dict[str, Any]:
    """Launch arguments of every row kernel. No contraction to fused multiply-adds: the compiler
    would choose them by the number of warps, and a row's bits would follow.
    """
    return {"PDL": pdl, "enable_fp_fusion": False} | ({"launch_pdl": True} if pdl else {})


def _quantise_torch(x: torch.Tensor, group: int | None) -> Fp8Rows:
    num_rows, width = x.shape
    group = group or width
    num_groups = -(-width // group)
    wide = x.float()
    if num_groups * group != width:
        wide = torch.nn.functional.pad(wide, (0, num_groups * group - width))
    groups = wide.reshape(num_rows, num_groups, group)
    amax = groups.abs().amax(-1).clamp_min_(MIN_AMAX)  # [num_rows, num_groups]
    # A tensor over a tensor: torch takes number / tensor as a reciprocal and a product.
    factors = torch.full_like(amax, FP8_MAX) / amax
    values = (groups * factors[..., None]).view(num_rows, -1)[:, :width]
    return Fp8Rows(values=values.to(FP8).contiguous(), scales=amax * (1 / FP8_MAX))


@triton.jit
def scales_of(amax):
    """(factors that bring values to FP8, the scales that bring them back) of amax [n] fp32."""
    amax = tl.maximum(amax, _MIN_AMAX)
    return tl.div_rn(tl.full(amax.shape, _MAX, tl.float32), amax), amax * (1.0 / _MAX)


@triton.jit
def store_row(
    x,
    out_ptr,
    scale_ptr,
    row,
    start,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Stores x [BLOCK] at columns start and up of a row: as it is (GROUP_SIZE 0), or quantised
    with a scale per GROUP_SIZE values; BLOCK itself stands for one scale per token.
    """
    # Eight neighbours per thread at every width of element, so that no value changes its thread.
    cols = start + tl.max_contiguous(tl.arange(0, BLOCK), 8)
    mask = cols < WIDTH
    if GROUP_SIZE == 0:
        tl.store(out_ptr + row * WIDTH + cols, x, mask=mask)
    else:
        num_groups: tl.constexpr = BLOCK // GROUP_SIZE
        total_groups: tl.constexpr = (WIDTH + GROUP_SIZE - 1) // GROUP_SIZE
        groups = tl.reshape(x.to(tl.float32), [num_groups, GROUP_SIZE])
        factors, scales = scales_of(tl.max(tl.abs(groups), axis=1))
        values = tl.reshape(groups * factors[:, None], [BLOCK]).to(tl.float8e4nv)
        tl.store(out_ptr + row * WIDTH + cols, values, mask=mask)
        group = start // GROUP_SIZE + tl.arange(0, num_groups)
        tl.store(scale_ptr + row * total_groups + group, scales, mask=group < total_groups)


@triton.jit
def _quantise_kernel(
    x_ptr,
    stride_row,
    out_ptr,
    scale_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.max_contiguous(tl.arange(0, BLOCK), 8)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + row * stride_row + cols, mask=cols < WIDTH, other=0.0)
    store_row(x, out_ptr, scale_ptr, row, start, WIDTH, BLOCK, GROUP_SIZE)


def _launch_triton(
    x: torch.Tensor, group: int | None, *, warps: int | None = None, pdl: bool = False
) -> Fp8Rows:
    num_rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out, values, scales = empty_rows(x, num_rows, width, "group" if group else "token")
    assert isinstance(out, Fp8Rows)
    block = max(GROUP, triton.next_power_of_2(width))
    if group:
        block = min(block, _GROUP_TILE)
    if num_rows:
        _quantise_kernel[(num_rows, triton.cdiv(width, block))](
            x,
            x.stride(0),
            values,
            scales,
            WIDTH=width,
            BLOCK=block,
            GROUP_SIZE=group or block,
            num_warps=warps or min(16, max(1, block // 1024)),
            **launch_options(pdl=pdl),
        )
    return out
