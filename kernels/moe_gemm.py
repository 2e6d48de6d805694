"""The feed-forward of chosen experts: gate and up, SiLU, down, weighted sum.

Owns the rounding and the order of summation: a token's result is the sum over its experts, the
best first, of weight * expert's output in fp32, rounded once. In front of down, FP8 rows have a
scale per 128 values whatever the weight's format. A token's bits depend on the token and the
weights alone, not on the tokens that chose the same experts. Never chooses an expert.
"""

from __future__ import annotations

import torch

from kernels.fp8_quant import Fp8Rows
from kernels.linear import linear
from kernels.moe_align import Align, moe_align
from kernels.moe_launch import launch_moe
from kernels.moe_routing import Routed
from kernels.silu_mul import silu_mul
from kernels.weight import Weight
from kernels.weight_stack import WeightStack


def moe_mlp(
    x: torch.Tensor | Fp8Rows,
    routed: Routed,
    gate_up: WeightStack,
    down: WeightStack,
    *,
    dtype: torch.dtype,
    align: Align = moe_align,
) -> torch.Tensor:
    """x [num_tokens, H], through each token's experts -> [num_tokens, H] in dtype.

    gate_up [num_experts, 2 * I, H], gate first; down [num_experts, H, I]. x must be quantised as
    gate_up's format asks (ValueError). align: sorts tokens on a GPU, see alignment.
    """
    _check(x, gate_up.of(0))
    if gate_up.values.is_cuda:
        return launch_moe(x, routed, gate_up, down, dtype=dtype, align=align)
    return _moe_torch(x, routed, gate_up, down, dtype)


def _check(x: torch.Tensor | Fp8Rows, weight: Weight) -> None:
    if isinstance(x, torch.Tensor):
        if x.dtype != weight.values.dtype:
            raise ValueError(f"x of {x.dtype} for experts of {weight.values.dtype}")
    elif weight.scales is None or x.scales.shape[1] != weight.num_groups:
        raise ValueError(
            f"x with {x.scales.shape[1]} scales a row for experts of {weight.values.dtype} that "
            f"take {weight.num_groups if weight.scales is not None else 'none'}"
        )


def _moe_torch(
    x: torch.Tensor | Fp8Rows,
    routed: Routed,
    gate_up: WeightStack,
    down: WeightStack,
    dtype: torch.dtype,
) -> torch.Tensor:
    expert_ids = routed.expert_ids.flatten().long()
    num_tokens, top_k = routed.expert_ids.shape
    order = torch.argsort(expert_ids, stable=True)
    counts = torch.bincount(expert_ids, minlength=gate_up.values.shape[0]).tolist()
    hidden = down.values.shape[1]
    out = torch.empty(num_tokens * top_k, hidden, dtype=dtype, device=routed.weights.device)
    start = 0
    wide = x if isinstance(x, torch.Tensor) else x.dequantise(torch.float32)
    for expert, count in enumerate(counts):
        if count:
            rows = order[start : start + count]
            inner = _product(wide[rows // top_k], gate_up.of(expert), dtype)
            fed = silu_mul(inner, quantise=None if down.scales is None else "group")
            if isinstance(fed, Fp8Rows):
                fed = fed.dequantise(torch.float32)
            out[rows] = _product(fed, down.of(expert), dtype)
            start += count
    return _combine(out.view(num_tokens, top_k, hidden), routed.weights)


def _product(x: torch.Tensor, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """x [num_rows, K], dequantised where the weight [N, K] is FP8 -> [num_rows, N]."""
    values = weight.values if weight.scales is None else weight.dequantise()
    return linear(x, values, tiles=weight.row_tiles).to(dtype)


def _combine(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """outputs [num_tokens, top_k, H], weights [num_tokens, top_k] -> [num_tokens, H]."""
    total = outputs[:, 0].float() * weights[:, :1]
    for rank in range(1, outputs.shape[1]):
        total += outputs[:, rank].float() * weights[:, rank : rank + 1]
    return total.to(outputs.dtype)
