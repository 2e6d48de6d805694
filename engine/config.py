"""The model's shape and arithmetic, read from config.json.

Owns the decision of what is supported: whatever would change the arithmetic and is not implemented
is
refused here, with a sentence that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError

_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_REFUSED_IF_SET = (
    "quantization_config",
    "partial_rotary_factor",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_local_experts",
    "num_experts",
    "layer_scale",
    "residual_multiplier",
    "embedding_multiplier",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base, and the llama3 frequency scaling when `factor` is not 1."""

    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_len: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the decoder needs to know."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    context_len: int
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: frozenset[int]

    @classmethod
    def load(cls, model_dir: Path) -> ModelConfig:
        """Reads config.json (and EOS ids of generation_config.json); ModelError names what is
        wrong.
        """
        path = model_dir / "config.json"
        if not path.is_file():
            raise ModelError(f"{path} does not exist: --model needs a Hugging Face model directory")
        raw = json.loads(path.read_text())
        _refuse(raw)
        architecture = raw["architectures"][0]
        try:
            return cls._build(raw, architecture, _eos_token_ids(raw, model_dir))
        except KeyError as error:
            raise ModelError(f"{path} lacks {error}") from error

    @classmethod
    def _build(cls, raw: Mapping[str, Any], architecture: str, eos: frozenset[int]) -> ModelConfig:
        num_heads = raw["num_attention_heads"]
        attention_bias = bool(raw.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // num_heads,
            rms_norm_eps=raw["rms_norm_eps"],
            rope=_rope(raw),
            context_len=raw["max_position_embeddings"],
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
            output_bias=architecture != "Qwen2ForCausalLM" and attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            eos_token_ids=eos,
        )


def _refuse(raw: Mapping[str, Any]) -> None:
    architectures = raw.get("architectures") or ["(none)"]
    if architectures[0] not in _ARCHITECTURES:
        raise ModelError(
            f"architecture {architectures[0]} is not supported; supported: {_ARCHITECTURES}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {raw['hidden_act']!r} is not supported; only silu is")
    for name in _REFUSED_IF_SET:
        if raw.get(name) not in (None, 0, 1, 1.0):
            raise ModelError(f"{name} = {raw[name]!r} changes the arithmetic and is not supported")
    other = sorted({kind for kind in raw.get("layer_types") or () if kind != "full_attention"})
    if other:
        raise ModelError(f"layer_types {other} are not supported; only full_attention is")
    window = raw.get("sliding_window")
    used = raw.get("use_sliding_window", architectures[0] == "MistralForCausalLM")
    if used and window is not None and window < raw.get("max_position_embeddings", 0):
        raise ModelError(f"sliding_window = {window} is not supported; only full attention is")
    if architectures[0] == "MistralForCausalLM" and raw.get("attention_bias"):
        raise ModelError("attention_bias is not part of MistralForCausalLM")


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: rope_theta + rope_scaling, and transformers 5's rope_parameters."""
    scaling = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelError("partial_rotary_factor changes the arithmetic and is not supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "llama3":
        raise ModelError(f"rope_type {kind!r} is not supported; supported: default, llama3")
    return RopeConfig(
        theta=theta,
        factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        original_context_len=scaling["original_max_position_embeddings"],
    )


def _eos_token_ids(raw: Mapping[str, Any], model_dir: Path) -> frozenset[int]:
    ids: set[int] = set()
    generation = model_dir / "generation_config.json"
    sources = [raw, json.loads(generation.read_text()) if generation.is_file() else {}]
    for source in sources:
        value = source.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)
