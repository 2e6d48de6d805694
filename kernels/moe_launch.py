"""Launches of the grouped products on a GPU: tile sizes by the number of tokens an expert gets.

Owns the sizes of tiles and blocks. What fixes the order of summation, block_k, follows the weight's
format alone. Never knows what the weights mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fp8_quant import GROUP, Fp8Rows
from kernels.moe_align import Align, Aligned
from kernels.moe_gemm_kernels import combine_kernel, down_kernel, gate_up_kernel
from kernels.moe_routing import Routed
from kernels.weight_stack import WeightStack

_COMBINE = 1024
_NUM_STAGES = 3
"""Two programs of gate and up share a multiprocessor's memory while tiles have 16 tokens."""
_BLOCK_N = GROUP
"""Of gate and up, so that a program sees all values of a scale behind SiLU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """One launch's blocks: tokens a tile, rows of down a program, warps."""

    tile_size: int
    down_n: int
    num_warps: int


def _sizes(num_pairs: int, num_experts: int) -> _Sizes:
    """By the mean number of tokens an expert gets: 16 while weights' bytes are the floor."""
    mean = num_pairs / num_experts
    if mean <= 16:
        return _Sizes(tile_size=16, down_n=64, num_warps=4)
    if mean <= 64:
        return _Sizes(tile_size=64, down_n=128, num_warps=8)
    return _Sizes(tile_size=128, down_n=128, num_warps=8)


def launch_moe(
    x: torch.Tensor | Fp8Rows,
    routed: Routed,
    gate_up: WeightStack,
    down: WeightStack,
    *,
    dtype: torch.dtype,
    align: Align,
) -> torch.Tensor:
    """As kernels.moe_gemm.moe_mlp, whose checks it relies on."""
    num_tokens, top_k = routed.expert_ids.shape
    hidden = down.values.shape[1]
    out = torch.empty(num_tokens, hidden, dtype=dtype, device=routed.weights.device)
    if num_tokens == 0:
        return out
    num_experts = gate_up.values.shape[0]
    sizes = _sizes(num_tokens * top_k, num_experts)
    aligned = align(routed.expert_ids, sizes.tile_size, num_experts)
    fed = _gate_up(x, gate_up, aligned, num_tokens * top_k, top_k, dtype, sizes)
    outputs = _down(fed, down, aligned, num_tokens * top_k, dtype, sizes)
    combine: Any = combine_kernel
    combine[(num_tokens, triton.cdiv(hidden, _COMBINE))](
        outputs,
        routed.weights,
        out,
        hidden,
        TOP_K=top_k,
        BLOCK=min(_COMBINE, triton.next_power_of_2(hidden)),
        num_warps=4,
        enable_fp_fusion=False,  # as the twin: a product and a sum, each rounded
    )
    return out


def _gate_up(
    x: torch.Tensor | Fp8Rows,
    weight: WeightStack,
    aligned: Aligned,
    num_pairs: int,
    top_k: int,
    dtype: torch.dtype,
    sizes: _Sizes,
) -> torch.Tensor | Fp8Rows:
    """[num_pairs, I] behind SiLU, with a scale per 128 values for FP8 weights."""
    inner, hidden = weight.values.shape[1] // 2, weight.values.shape[2]
    values = _operand(x)
    if isinstance(x, Fp8Rows):
        fed = torch.empty(num_pairs, inner, dtype=x.values.dtype, device=values.device)
        scales = torch.empty(num_pairs, -(-inner // GROUP), device=values.device)
        out: torch.Tensor | Fp8Rows = Fp8Rows(values=fed, scales=scales)
    else:
        out = fed = scales = torch.empty(num_pairs, inner, dtype=dtype, device=values.device)
    constants = _constants(weight, sizes, _BLOCK_N)
    kernel: Any = gate_up_kernel
    kernel[(aligned.max_tiles * triton.cdiv(inner, _BLOCK_N),)](
        _descriptor(weight, constants),
        values,
        x.scales if isinstance(x, Fp8Rows) else values,
        values if weight.scales is None else weight.scales,
        aligned.pairs,
        aligned.tile_experts,
        aligned.num_padded,
        fed,
        scales,
        num_pairs,
        top_k,
        hidden,
        inner,
        -(-hidden // GROUP),
        DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
        **constants,
    )
    return out


def _down(
    fed: torch.Tensor | Fp8Rows,
    weight: WeightStack,
    aligned: Aligned,
    num_pairs: int,
    dtype: torch.dtype,
    sizes: _Sizes,
) -> torch.Tensor:
    """[num_pairs, H], a row for each pair of a token and one of its experts."""
    hidden, inner = weight.values.shape[1:]
    values = _operand(fed)
    out = torch.empty(num_pairs, hidden, dtype=dtype, device=values.device)
    constants = _constants(weight, sizes, sizes.down_n)
    kernel: Any = down_kernel
    kernel[(aligned.max_tiles * triton.cdiv(hidden, sizes.down_n),)](
        _descriptor(weight, constants),
        values,
        fed.scales if isinstance(fed, Fp8Rows) else values,
        values if weight.scales is None else weight.scales,
        aligned.pairs,
        aligned.tile_experts,
        aligned.num_padded,
        out,
        num_pairs,
        hidden,
        inner,
        **constants,
    )
    return out


def _operand(x: torch.Tensor | Fp8Rows) -> torch.Tensor:
    values = x if isinstance(x, torch.Tensor) else x.values
    return values.contiguous()


def _descriptor(weight: WeightStack, constants: dict[str, Any]) -> TensorDescriptor:
    """Of all experts' rows, one above the other."""
    block = [constants["BLOCK_N"], constants["BLOCK_K"]]
    return TensorDescriptor.from_tensor(weight.values.flatten(0, 1), block)


def _constants(weight: WeightStack, sizes: _Sizes, block_n: int) -> dict[str, Any]:
    scales = weight.scales
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": sizes.tile_size,
        # 128 bytes: what a line of shared memory and a scale's group hold.
        "BLOCK_K": GROUP // weight.values.itemsize,
        "NUM_STAGES": _NUM_STAGES,
        "PER_CHANNEL": scales is not None and scales.dim() == 2,
        "BLOCK_SCALED": scales is not None and scales.dim() == 3,
        "num_warps": sizes.num_warps,
    }
