"""The feed-forward of chosen experts: gate and up, SiLU, down, weighted sum.

Owns the order of summation: a token's result is the sum over its experts, the best first, of
weight * expert's output in fp32, rounded once. A token's bits depend on the token and the weights
alone, not on the tokens that chose the same experts. Never chooses an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.fp8_quant import Fp8Rows, Quantise
from kernels.linear import linear, prepare_weight
from kernels.moe_routing import Routed
from kernels.silu_mul import silu_mul
from kernels.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One projection of all experts: values [num_experts, N, K], contiguous.

    scales: as of kernels.weight.Weight with num_experts in front; row_tiles: on a CPU, as there.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    row_tiles: tuple[int, ...] = ()

    def of(self, expert: int) -> Weight:
        """One expert's weight."""
        scales = None if self.scales is None else self.scales[expert]
        return Weight(values=self.values[expert], scales=scales, row_tiles=self.row_tiles)


def prepare_experts(
    values: torch.Tensor,
    scales: torch.Tensor | None = None,
    seen: dict[tuple[int, ...], tuple[int, ...]] | None = None,
) -> ExpertWeights:
    """values, scales as ExpertWeights says (ValueError where they do not fit), with tile sizes.

    seen: as prepare_weight takes it.
    """
    first = prepare_weight(values[0], None if scales is None else scales[0], None, seen)
    return ExpertWeights(values=values, scales=scales, row_tiles=first.row_tiles)


def moe_mlp(
    x: torch.Tensor | Fp8Rows,
    routed: Routed,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    *,
    dtype: torch.dtype,
    quantise: Quantise | None = None,
) -> torch.Tensor:
    """x [num_tokens, H], through each token's experts -> [num_tokens, H] in dtype.

    gate_up [num_experts, 2 * I, H], gate first; down [num_experts, H, I]. x must be quantised as
    gate_up's format asks (ValueError); quantise: how the rows in front of down are.
    """
    expert_ids = routed.expert_ids.flatten().long()
    num_tokens, top_k = routed.expert_ids.shape
    order = torch.argsort(expert_ids, stable=True)
    counts = torch.bincount(expert_ids, minlength=gate_up.values.shape[0]).tolist()
    hidden = down.values.shape[1]
    out = torch.empty(num_tokens * top_k, hidden, dtype=dtype, device=routed.weights.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = order[start : start + count]
            inner = linear(_rows(x, rows // top_k), gate_up.of(expert), dtype=dtype)
            fed = silu_mul(inner, quantise=quantise, dtype=dtype)
            out[rows] = linear(fed, down.of(expert), dtype=dtype)
            start += count
    return combine(out.view(num_tokens, top_k, hidden), routed.weights)


def combine(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """outputs [num_tokens, top_k, H], weights [num_tokens, top_k] -> [num_tokens, H]."""
    total = outputs[:, 0].float() * weights[:, :1]
    for index in range(1, outputs.shape[1]):
        total += outputs[:, index].float() * weights[:, index : index + 1]
    return total.to(outputs.dtype)


def _rows(x: torch.Tensor | Fp8Rows, rows: torch.Tensor) -> torch.Tensor | Fp8Rows:
    if isinstance(x, torch.Tensor):
        return x[rows]
    # Not every build of torch indexes float8.
    values = x.values.view(torch.uint8)[rows].view(x.values.dtype)
    return Fp8Rows(values=values, scales=x.scales[rows])
