"""Which layers are mixtures of experts and how tokens find theirs, read from config.json.

Owns the keys of each architecture's experts. Never reads weights; what of other models changes the
arithmetic is refused in engine/config_check.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config_check import (
    flag,
    non_negative_int,
    non_negative_ints,
    positive_float,
    positive_int,
)
from engine.errors import ModelError
from kernels import ops

_DECODER_SPARSE_STEP = 1
"""transformers' value where Qwen3-MoE's config.json has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Experts of the sparse layers: num_experts of intermediate_size each, chosen by routing.

    shared_size: intermediate size of what every token goes through besides, 0 without; wide_router:
    logits are computed in fp32; biased: the choice has a correction bias. router, experts: the
    modules' names in a checkpoint's layer; parts: an expert's gate, up and down projections.
    """

    num_experts: int
    intermediate_size: int
    routing: ops.Routing
    sparse_layers: frozenset[int]
    shared_size: int = 0
    wide_router: bool = False
    biased: bool = False
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
    if architecture in ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"):
        return _deepseek(raw, num_layers, biased=architecture == "DeepseekV3ForCausalLM")
    return None


def _deepseek(raw: Mapping[str, Any], num_layers: int, *, biased: bool) -> MoeConfig:
    """V3 if biased, else V2."""
    num_experts = positive_int("n_routed_experts", raw["n_routed_experts"])
    routing = _deepseek_v3_routing(raw) if biased else _deepseek_v2_routing(raw)
    try:
        routing.check(num_experts)
    except ValueError as error:
        names = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok")
        given = ", ".join(f"{name} {raw[name]}" for name in names if name in raw)
        raise ModelError(f"{given}: {error}") from error
    size = positive_int("moe_intermediate_size", raw["moe_intermediate_size"])
    num_dense = non_negative_int("first_k_dense_replace", raw["first_k_dense_replace"])
    return MoeConfig(
        num_experts=num_experts,
        intermediate_size=size,
        routing=routing,
        sparse_layers=frozenset(range(num_dense, num_layers)),
        shared_size=size * positive_int("n_shared_experts", raw["n_shared_experts"]),
        wide_router=True,
        biased=biased,
    )


def _deepseek_v2_routing(raw: Mapping[str, Any]) -> ops.Routing:
    method = raw.get("topk_method", "greedy")
    _expect("topk_method", method, ("greedy", "group_limited_greedy"))
    # transformers does not read it.
    _expect("norm_topk_prob", raw.get("norm_topk_prob"), (None, False))
    is_grouped = method == "group_limited_greedy"
    return ops.Routing(
        top_k=positive_int("num_experts_per_tok", raw["num_experts_per_tok"]),
        renormalise=False,
        num_groups=positive_int("n_group", raw["n_group"]) if is_grouped else 1,
        top_groups=positive_int("topk_group", raw["topk_group"]) if is_grouped else 1,
        scale=positive_float("routed_scaling_factor", raw["routed_scaling_factor"]),
    )


def _deepseek_v3_routing(raw: Mapping[str, Any]) -> ops.Routing:
    _expect("topk_method", raw.get("topk_method"), (None, "noaux_tc"))
    _expect("scoring_func", raw.get("scoring_func"), (None, "sigmoid"))
    return ops.Routing(
        top_k=positive_int("num_experts_per_tok", raw["num_experts_per_tok"]),
        renormalise=flag({"norm_topk_prob": True, **raw}, "norm_topk_prob"),
        scoring="sigmoid",
        num_groups=positive_int("n_group", raw["n_group"]),
        top_groups=positive_int("topk_group", raw["topk_group"]),
        group_score="top2",
        scale=positive_float("routed_scaling_factor", raw["routed_scaling_factor"]),
    )


def _expect(name: str, value: object, supported: tuple[object, ...]) -> None:
    # Of one type, too: 0 is not false.
    if not any(type(value) is type(one) and value == one for one in supported):
        raise ModelError(f"{name} {value!r} is not supported; supported: {list(supported)}")


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
