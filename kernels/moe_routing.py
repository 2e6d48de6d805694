"""Which experts a token goes to, and with what weight.

Owns the order of choice: the larger score first, of equal ones the lower expert or group. A token's
choice depends on its own logits alone. Never moves a token.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl

# Added to a sum of weights before dividing by it, as DeepSeek-V3 does: a sum of zeros gives zeros.
_LEAST_SUM = 1e-20
_LEAST = tl.constexpr(_LEAST_SUM)
_NUM_WARPS = 1
"""The order of softmax's sum follows it: the same for every number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a token's experts follow from its logits [num_experts].

    Scores are softmax or sigmoid of the logits; experts are chosen by score + bias (where there is
    one), weighted by score alone. With num_groups > 1 only the experts of the top_groups best
    groups of neighbours can be chosen; a group is as good as its best expert ("max") or the sum of
    its two best ("top2"). renormalise: weights are made to sum to 1; then they are times scale.
    """

    top_k: int
    renormalise: bool
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    scale: float = 1.0

    def check(self, num_experts: int) -> None:
        """ValueError names what does not fit num_experts."""
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups: {self.top_groups}; 1 to num_groups {self.num_groups}")
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups: {self.num_groups}; a divisor of {num_experts} experts")
        group_size = num_experts // self.num_groups
        if self.num_groups > 1 and self.group_score == "top2" and group_size < 2:
            raise ValueError(f"num_groups: {self.num_groups}; groups of 2 experts are the smallest")
        if not 1 <= self.top_k <= group_size * self.top_groups:
            raise ValueError(f"top_k: {self.top_k}; 1 to {group_size * self.top_groups} experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """expert_ids [num_tokens, top_k] int32, the best first; weights [num_tokens, top_k] fp32."""

    expert_ids: torch.Tensor
    weights: torch.Tensor


def moe_route(logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None) -> Routed:
    """logits [num_tokens, num_experts], bias [num_experts] fp32 -> experts and weights, in fp32.

    ValueError if routing does not fit the number of experts.
    """
    routing.check(logits.shape[1])
    if logits.is_cuda:
        return _launch_triton(logits, routing, bias)
    return _route_torch(logits, routing, bias)


def in_order_sum(values: torch.Tensor) -> torch.Tensor:
    """values [num_rows, count, ...] summed over axis 1 from the first to the last."""
    total = values[:, 0].clone()
    for index in range(1, values.shape[1]):
        total += values[:, index]
    return total


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of each row: topk leaves the order of equal ones open."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]


def _route_torch(logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None) -> Routed:
    wide = logits.float()
    if routing.scoring == "softmax":
        # torch's softmax over the last dimension computes row by row, whatever rows there are.
        scores = torch.softmax(wide, dim=-1)
    else:
        # torch's sigmoid gives an element other bits in a vector's tail: see kernels.silu_mul.
        denominator = torch.exp(-wide).add_(1.0)
        scores = torch.ones_like(wide).div_(denominator)
    choice = scores if bias is None else scores + bias
    if routing.num_groups > 1:
        groups = choice.unflatten(-1, (routing.num_groups, -1))
        best = groups.topk(2 if routing.group_score == "top2" else 1, dim=-1).values
        group_scores = in_order_sum(best.movedim(-1, 1))
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, _best(group_scores, routing.top_groups), True)
        choice = groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    expert_ids = _best(choice, routing.top_k)
    weights = scores.gather(1, expert_ids)
    if routing.renormalise:
        weights = weights / (in_order_sum(weights) + _LEAST_SUM)[:, None]
    return Routed(expert_ids=expert_ids.to(torch.int32), weights=weights * routing.scale)


@triton.jit
def _first_best(values, ids, NUM: tl.constexpr):
    """(largest of values, lowest of its ids): both scalars; NUM where every value is NaN."""
    best = tl.max(values)
    return best, tl.min(tl.where(values == best, ids, NUM))


@triton.jit
def _keep_groups(
    choice, groups, ids, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, NUM: tl.constexpr
):
    """choice [groups, size] with -inf outside the best groups; groups [groups], ids as choice."""
    best = tl.max(choice, axis=1)
    if TOP2:
        first = tl.min(tl.where(choice == best[:, None], ids, NUM), axis=1)
        second = tl.max(tl.where(ids == first[:, None], float("-inf"), choice), axis=1)
        best = best + second
    kept = groups < 0
    for _turn in tl.static_range(TOP_GROUPS):
        _score, group = _first_best(tl.where(kept, float("-inf"), best), groups, NUM)
        kept = kept | (groups == group)
    return tl.where(kept[:, None], choice, float("-inf"))


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    stride,
    scale,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    groups, places = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_SIZE)
    ids = groups[:, None] * GROUP_SIZE + places[None, :]
    valid = (groups[:, None] < NUM_GROUPS) & (places[None, :] < GROUP_SIZE)
    last: tl.constexpr = NUM_GROUPS * GROUP_SIZE - 1
    ids = tl.where(valid, ids, last + 1)
    logits = tl.load(logits_ptr + row * stride + ids, mask=valid, other=float("-inf"))
    logits = logits.to(tl.float32)
    if SIGMOID:
        scores = tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
    else:
        powers = tl.exp(logits - tl.max(logits))
        scores = tl.div_rn(powers, tl.broadcast_to(tl.sum(powers), powers.shape))
    choice = scores
    if HAS_BIAS:
        choice = scores + tl.load(bias_ptr + ids, mask=valid, other=0.0)
    choice = tl.where(valid, choice, float("-inf"))
    if NUM_GROUPS > TOP_GROUPS:
        choice = _keep_groups(choice, groups, ids, TOP_GROUPS, TOP2, last + 1)
    ranks = tl.arange(0, BLOCK_K)
    experts = tl.zeros([BLOCK_K], dtype=tl.int32)
    weights = tl.zeros([BLOCK_K], dtype=tl.float32)
    total = 0.0
    for rank in tl.static_range(TOP_K):
        _score, expert = _first_best(choice, ids, last + 1)
        weight = tl.sum(tl.where(ids == expert, scores, 0.0))
        choice = tl.where(ids == expert, float("-inf"), choice)
        # Logits of NaN choose nothing: what follows must still find an expert.
        experts = tl.where(ranks == rank, tl.minimum(expert, last), experts)
        weights = tl.where(ranks == rank, weight, weights)
        total = total + weight
    if RENORMALISE:
        weights = tl.div_rn(weights, tl.broadcast_to(total + _LEAST, weights.shape))
    kept = ranks < TOP_K
    tl.store(expert_ptr + row * TOP_K + ranks, experts, mask=kept)
    tl.store(weight_ptr + row * TOP_K + ranks, weights * scale, mask=kept)


def _launch_triton(logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None) -> Routed:
    num_tokens, num_experts = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    shape, group_size = (num_tokens, routing.top_k), num_experts // routing.num_groups
    expert_ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    kernel: Any = _route_kernel
    if num_tokens:
        kernel[(num_tokens,)](
            logits,
            weights if bias is None else bias,
            expert_ids,
            weights,
            logits.stride(0),
            routing.scale,
            NUM_GROUPS=routing.num_groups,
            GROUP_SIZE=group_size,
            BLOCK_GROUPS=triton.next_power_of_2(routing.num_groups),
            BLOCK_SIZE=triton.next_power_of_2(group_size),
            TOP_K=routing.top_k,
            BLOCK_K=triton.next_power_of_2(routing.top_k),
            TOP_GROUPS=routing.top_groups,
            TOP2=routing.group_score == "top2",
            SIGMOID=routing.scoring == "sigmoid",
            HAS_BIAS=bias is not None,
            RENORMALISE=routing.renormalise,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,  # a weight's bits must not follow the compiler's choice
        )
    return Routed(expert_ids=expert_ids, weights=weights)
