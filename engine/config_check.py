"""What config.json may say: options that change the arithmetic, and the types of values.

Owns the table of options of other models and the values at which they change nothing. Never
computes a size; engine/config.py does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from engine.errors import ModelError

# Architecture -> model_type, as transformers writes them.
ARCHITECTURES = {
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
DEEPSEEK = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
_MAX_INT = 2**31 - 1
# sliding_window of the others where the key is absent, as transformers sets it.
_DEFAULT_WINDOW = 4096
_NO_DEFAULT_WINDOW = ("LlamaForCausalLM", "MixtralForCausalLM", *DEEPSEEK)
# Only these read use_sliding_window; elsewhere a window that is set is used.
_SWITCHED_WINDOW = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_BIASED = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", *DEEPSEEK)
_DEEPSEEK_READ = {
    "auto_map",  # names the code that transformers had not got yet
    "first_k_dense_replace",
    "kv_lora_rank",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "q_lora_rank",
    "routed_scaling_factor",
    "topk_group",
    "topk_method",
}
# Options of the table below that engine/moe_config.py and engine/mla_config.py read.
_READ: dict[str, set[str]] = {
    "DeepseekV2ForCausalLM": _DEEPSEEK_READ,
    "DeepseekV3ForCausalLM": _DEEPSEEK_READ | {"scoring_func"},
    "MixtralForCausalLM": {"num_experts", "num_local_experts"},
    "Qwen3MoeForCausalLM": {
        "num_experts",
        "num_local_experts",
        "decoder_sparse_step",
        "mlp_only_layers",
        "norm_topk_prob",
    },
}

_FLAG = (None, False)
_MULTIPLIER = (None, 1)
_COUNT = (None, 0)
_ONLY_NULL = (None,)
_SILU = (None, "silu", "swish")
# Option -> values that change nothing; compared by type too, so that true is not 1 nor false 0.
# An absent option changes nothing either.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": _SILU,
    "activation_function": _SILU,
    "norm_type": (None, "rmsnorm", "rms_norm"),
    "position_embedding_type": (None, "rope", "rotary"),
    # transformers reads null as false: every position would see every other.
    "is_causal": (True,),
    "no_bias": (None, True),
    "auto_map": (None, {}),
    "per_layer_config": (None, {}),
    "cross_attention_layers": (None, []),
    **dict.fromkeys(
        (
            "add_bias_linear",
            "add_cross_attention",
            "alibi",
            "attention_sinks",
            "attn_output_gate",
            "bias",
            "is_encoder_decoder",
            "layer_scale",
            "lm_head_bias",
            "mup_enabled",
            "new_decoder_architecture",
            "parallel_attn",
            "qk_layernorm",
            "rope_interleaved",
            "scale_embedding",
            "use_alibi",
            "use_bias",
            "use_dynamic_ntk",
            "use_logn_attn",
            "use_mrope",
            "use_parallel_residual",
            "use_qk_norm",
        ),
        _FLAG,
    ),
    **dict.fromkeys(
        (
            "embedding_multiplier",
            "key_multiplier",
            "lm_head_multiplier",
            "logit_scale",
            "logits_scaling",
            "partial_rotary_factor",
            "residual_multiplier",
            "rotary_pct",
            "scale_emb",
        ),
        _MULTIPLIER,
    ),
    **dict.fromkeys(
        (
            "first_k_dense_replace",
            "n_shared_experts",
            "num_experts",
            "num_local_experts",
            "num_shared_experts",
            "shared_expert_intermediate_size",
        ),
        _COUNT,
    ),
    # How tokens are routed: softmax over all experts, top-k, renormalised.
    **dict.fromkeys(
        (
            "decoder_sparse_step",
            "moe_layer_freq",
            "n_group",
            "routed_scaling_factor",
            "topk_group",
        ),
        _MULTIPLIER,
    ),
    "mlp_only_layers": (None, []),
    "norm_topk_prob": (None, True),
    "scoring_func": (None, "softmax"),
    "topk_method": (None, "greedy"),
    # Of the scales none is neutral at 1: each stands in place of a number that is not 1.
    **dict.fromkeys(
        (
            "attention_chunk_size",
            "attention_multiplier",
            "attn_logit_softcapping",
            "clip_qkv",
            "dim_model_base",
            "final_logit_softcapping",
            "kv_lora_rank",
            "n_routed_experts",
            "no_rope_layer_interval",
            "no_rope_layers",
            "q_lora_rank",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "scale_depth",
        ),
        _ONLY_NULL,
    ),
}


def refuse(raw: Mapping[str, Any]) -> str:
    """The architecture; ModelError for whatever would change the arithmetic."""
    architecture = _architecture(raw)
    for name in _NEUTRAL:
        if name not in _READ.get(architecture, ()):
            refuse_option(name, raw)
    for name in ("quantization_config", "compression_config"):
        if not isinstance(raw.get(name), dict | None):
            raise ModelError(f"{name} is {raw[name]!r}; it must be an object or null")
    _refuse_layers(raw)
    _refuse_window(raw, architecture)
    if flag(raw, "attention_bias") and architecture not in _BIASED:
        raise ModelError(f"attention_bias is not part of {architecture}")
    if flag(raw, "mlp_bias") and architecture != "LlamaForCausalLM":
        raise ModelError(f"mlp_bias is not part of {architecture}")
    return architecture


def refuse_option(name: str, values: Mapping[str, Any]) -> None:
    """ModelError if values has the option at anything but a neutral value."""
    if name not in values:
        return
    value, neutral = values[name], _NEUTRAL[name]
    if not any(isinstance(value, bool) == isinstance(n, bool) and value == n for n in neutral):
        supported = ", ".join(json.dumps(n) for n in neutral)
        raise ModelError(
            f"{name} {value!r} changes the arithmetic and is not supported; supported: {supported}"
        )


def flag(values: Mapping[str, Any], name: str) -> bool:
    """A boolean, false where it is absent."""
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise ModelError(f"{name} is {value!r}; it must be true or false")
    return value


def positive_int(name: str, value: object) -> int:
    """The value, if it is an integer that fits a size."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_INT:
        raise ModelError(f"{name} is {value!r}; it must be an integer from 1 to {_MAX_INT}")
    return value


def non_negative_int(name: str, value: object) -> int:
    """The value, if it is 0 or fits a size."""
    return 0 if value == 0 and not isinstance(value, bool | float) else positive_int(name, value)


def non_negative_ints(name: str, value: object) -> frozenset[int]:
    """The values of a list of integers from 0; none for null."""
    values = [] if value is None else value
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        raise ModelError(f"{name} is {value!r}; it must be a list of integers from 0, or null")
    return frozenset(values)


def positive_float(name: str, value: object) -> float:
    """The value as a float, if it is a finite number above 0."""
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond every float
            number = math.inf
    if not 0.0 < number < math.inf:
        raise ModelError(f"{name} is {value!r}; it must be a finite number above 0")
    return number


def _architecture(raw: Mapping[str, Any]) -> str:
    architectures, supported = raw.get("architectures"), ", ".join(ARCHITECTURES)
    if architectures not in [[name] for name in ARCHITECTURES]:
        raise ModelError(f"architectures {architectures} is not supported; supported: {supported}")
    architecture = raw["architectures"][0]
    if raw.get("model_type", ARCHITECTURES[architecture]) != ARCHITECTURES[architecture]:
        raise ModelError(f"model_type {raw['model_type']!r} does not belong to {architecture}")
    return architecture


def _refuse_layers(raw: Mapping[str, Any]) -> None:
    kinds = raw.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise ModelError(f"layer_types is {kinds!r}; it must be a list or null")
    other = [kind for kind in kinds or () if kind != "full_attention"]
    if other:
        raise ModelError(f"layer_types {other[0]!r} is not supported; only 'full_attention' is")


def _refuse_window(raw: Mapping[str, Any], architecture: str) -> None:
    """ModelError for a window that would be used and is smaller than the context."""
    if architecture in _SWITCHED_WINDOW and not flag(raw, "use_sliding_window"):
        return
    default = None if architecture in _NO_DEFAULT_WINDOW else _DEFAULT_WINDOW
    window = raw.get("sliding_window", default)
    if window is None:
        return
    context_len = positive_int("max_position_embeddings", raw["max_position_embeddings"])
    if positive_int("sliding_window", window) < context_len:
        absent = "" if "sliding_window" in raw else " (what transformers takes if it is absent)"
        raise ModelError(
            f"sliding_window {window}{absent} is not supported; only full attention is: null, or "
            f"max_position_embeddings {context_len} or more"
        )
