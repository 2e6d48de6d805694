"""Which experts a token goes to, and with what weight.

Owns the order of choice: the larger probability first, of equal ones the lower expert. A token's
choice depends on its own logits alone. Never moves a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """top_k experts a token; renormalise: their weights are made to sum to 1."""

    top_k: int
    renormalise: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """expert_ids [num_tokens, top_k] int32, the best first; weights [num_tokens, top_k] fp32."""

    expert_ids: torch.Tensor
    weights: torch.Tensor


def moe_route(logits: torch.Tensor, routing: Routing) -> Routed:
    """logits [num_tokens, num_experts] -> the experts of each token, by softmax in fp32.

    ValueError if there are fewer experts than routing chooses.
    """
    num_experts = logits.shape[1]
    if num_experts < routing.top_k:
        raise ValueError(f"top_k: {routing.top_k}; at most {num_experts} experts")
    return _route_torch(logits, routing)


def _route_torch(logits: torch.Tensor, routing: Routing) -> Routed:
    # torch's softmax over the last dimension computes row by row, whatever rows there are.
    scores = torch.softmax(logits.float(), dim=-1)
    # topk leaves the order of equal values open, a stable sort does not.
    ordered, expert_ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    weights = ordered[:, : routing.top_k]
    if routing.renormalise:
        weights = weights / in_order_sum(weights)[:, None]
    return Routed(
        expert_ids=expert_ids[:, : routing.top_k].to(torch.int32).contiguous(),
        weights=weights.contiguous(),
    )


def in_order_sum(values: torch.Tensor) -> torch.Tensor:
    """values [num_rows, count, ...] summed over axis 1 from the first to the last."""
    total = values[:, 0].clone()
    for index in range(1, values.shape[1]):
        total += values[:, index]
    return total
