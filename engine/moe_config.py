"""Which layers are mixtures of experts and how tokens find theirs, read from config.json.

Owns the keys of each architecture's experts. Never reads weights; what of other models changes the
arithmetic is refused in engine/config_check.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config_check import flag, non_negative_ints, positive_int
from engine.errors import ModelError
from kernels import ops

_DECODER_SPARSE_STEP = 1
"""transformers' value where Qwen3-MoE's config.json has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Experts of the sparse layers: num_experts of intermediate_size each, chosen by routing.

    router, experts: the modules' names in a checkpoint's layer; parts: an expert's gate, up and
    down projections.
    """

    num_experts: int
    intermediate_size: int
    routing: ops.Routing
    sparse_layers: frozenset[int]
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


def moe_config(raw: Mapping[str, Any], architecture: str, num_layers: int) -> MoeConfig | None:
    """The experts that config.json describes, None for a dense architecture.

    KeyError names a missing key, ModelError what is wrong or does not fit.
    """
    if architecture == "MixtralForCausalLM":
        num_experts, top_k = _sizes(raw)
        return MoeConfig(
            num_experts=num_experts,
            intermediate_size=positive_int("intermediate_size", raw["intermediate_size"]),
            routing=ops.Routing(top_k=top_k, renormalise=True),
            sparse_layers=frozenset(range(num_layers)),
            router="block_sparse_moe.gate",
            experts="block_sparse_moe.experts",
            parts=("w1", "w3", "w2"),
        )
    if architecture == "Qwen3MoeForCausalLM":
        num_experts, top_k = _sizes(raw)
        size = positive_int("moe_intermediate_size", raw["moe_intermediate_size"])
        return MoeConfig(
            num_experts=num_experts,
            intermediate_size=size,
            routing=ops.Routing(top_k=top_k, renormalise=flag(raw, "norm_topk_prob")),
            sparse_layers=_qwen3_sparse_layers(raw, num_layers),
        )
    return None


def _sizes(raw: Mapping[str, Any]) -> tuple[int, int]:
    """(experts, experts a token goes to); transformers 5 writes num_local_experts for both names.

    Both names with different numbers are a ModelError, as are more choices than experts.
    """
    names = [name for name in ("num_experts", "num_local_experts") if name in raw]
    if not names:
        raise KeyError("num_local_experts")
    counts = {name: positive_int(name, raw[name]) for name in names}
    if len(set(counts.values())) > 1:
        raise ModelError(f"num_experts and num_local_experts differ: {counts}")
    num_experts = counts[names[0]]
    top_k = positive_int("num_experts_per_tok", raw["num_experts_per_tok"])
    if top_k > num_experts:
        raise ModelError(f"num_experts_per_tok is {top_k}; {names[0]} is {num_experts}")
    return num_experts, top_k


def _qwen3_sparse_layers(raw: Mapping[str, Any], num_layers: int) -> frozenset[int]:
    """Every decoder_sparse_step-th layer that is not in mlp_only_layers."""
    dense = non_negative_ints("mlp_only_layers", raw.get("mlp_only_layers"))
    step = positive_int("decoder_sparse_step", raw.get("decoder_sparse_step", _DECODER_SPARSE_STEP))
    return frozenset(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
