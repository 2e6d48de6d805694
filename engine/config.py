"""The model's shape and arithmetic, read from config.json.

Owns the decision of what is supported: whatever would change the arithmetic and is not implemented
is refused here, with a sentence that names it. Never reads weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError

# Architecture -> model_type, as transformers writes them.
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Options of other models that would change the arithmetic; neutral at None, False, 0 and 1.
_REFUSED_IF_SET = (
    "quantization_config",
    "compression_config",
    "auto_map",
    "partial_rotary_factor",
    "rotary_pct",
    "rope_interleaved",
    "alibi",
    "clip_qkv",
    "use_qk_norm",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "scale_emb",
    "scale_depth",
    "layer_scale",
    "attention_sinks",
    "attention_chunk_size",
    "no_rope_layers",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "kv_lora_rank",
    "cross_attention_layers",
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
        """Reads config.json, and EOS ids of generation_config.json too.

        ModelError names file, key and value of what is missing, wrong or not supported.
        """
        path = model_dir / "config.json"
        if not path.is_file():
            raise ModelError(f"{path} does not exist: --model needs a Hugging Face model directory")
        raw = _read_json(path)
        try:
            _refuse(raw)
            config = cls._build(raw, raw["architectures"][0], _eos_token_ids(raw, model_dir))
            config.check()
        except KeyError as error:
            raise ModelError(f"{path}: {error.args[0]} is missing") from error
        except (TypeError, AttributeError) as error:
            raise ModelError(f"{path}: a value has the wrong type: {error}") from error
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
        return config

    def check(self) -> None:
        """ModelError if sizes do not fit each other."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "context_len",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"{name} is {value!r}; it must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        for token_id in self.eos_token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
                raise ModelError(f"eos_token_id {token_id!r} is not in the vocabulary")

    @classmethod
    def _build(cls, raw: Mapping[str, Any], architecture: str, eos: frozenset[int]) -> ModelConfig:
        num_heads = raw["num_attention_heads"]
        # Only Llama's default is one KV head a head; elsewhere an absent key means another number.
        llama = architecture == "LlamaForCausalLM"
        num_kv_heads = raw.get("num_key_value_heads") if llama else raw["num_key_value_heads"]
        head_dim = raw["head_dim"] if architecture == "Qwen3ForCausalLM" else raw.get("head_dim")
        attention_bias = bool(raw.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=raw["hidden_size"] // num_heads if head_dim is None else head_dim,
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
    architecture = architectures[0]
    if len(architectures) != 1 or architecture not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ModelError(f"architectures {architectures} is not supported; supported: {supported}")
    if raw.get("model_type", _ARCHITECTURES[architecture]) != _ARCHITECTURES[architecture]:
        raise ModelError(f"model_type {raw['model_type']!r} does not belong to {architecture}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"hidden_act {raw['hidden_act']!r} is not supported; only silu is")
    for name in _REFUSED_IF_SET:
        if raw.get(name) not in (None, False, 0, 1, 1.0, [], {}):
            raise ModelError(f"{name} {raw[name]!r} changes the arithmetic and is not supported")
    other = sorted({kind for kind in raw.get("layer_types") or () if kind != "full_attention"})
    if other:
        raise ModelError(f"layer_types {other} are not supported; only full_attention is")
    window = raw.get("sliding_window")
    used = raw.get("use_sliding_window", architecture == "MistralForCausalLM")
    if used and window is not None and window < raw["max_position_embeddings"]:
        raise ModelError(f"sliding_window {window} is not supported; only full attention is")
    biased = ("LlamaForCausalLM", "Qwen3ForCausalLM")
    if raw.get("attention_bias") and architecture not in biased:
        raise ModelError(f"attention_bias is not part of {architecture}")
    if raw.get("mlp_bias") and architecture != "LlamaForCausalLM":
        raise ModelError(f"mlp_bias is not part of {architecture}")


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: rope_theta + rope_scaling, and transformers 5's rope_parameters."""
    scaling = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    per_layer = sorted(name for name, value in scaling.items() if isinstance(value, dict))
    if per_layer:
        raise ModelError(f"rope_parameters per layer type ({per_layer}) are not supported")
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelError("partial_rotary_factor changes the arithmetic and is not supported")
    if kind == "default":
        return RopeConfig(theta=float(theta))
    if kind != "llama3":
        raise ModelError(f"rope_type {kind!r} is not supported; supported: default, llama3")
    rope = RopeConfig(
        theta=float(theta),
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_context_len=scaling["original_max_position_embeddings"],
    )
    if rope.factor < 1.0 or not rope.low_freq_factor < rope.high_freq_factor:
        raise ModelError(
            f"llama3 rope scaling: factor {rope.factor} must be at least 1 and low_freq_factor "
            f"{rope.low_freq_factor} less than high_freq_factor {rope.high_freq_factor}"
        )
    return rope


def _eos_token_ids(raw: Mapping[str, Any], model_dir: Path) -> frozenset[int]:
    ids: set[int] = set()
    generation = model_dir / "generation_config.json"
    sources = [raw, _read_json(generation) if generation.is_file() else {}]
    for source in sources:
        value = source.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value
