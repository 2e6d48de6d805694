"""The model's shape and arithmetic, read from config.json.

Owns how sizes and rotary embedding follow from the keys, as transformers reads them; what is
refused is in engine/config_check.py. Never reads weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config_check import flag, positive_float, positive_int, refuse, refuse_option
from engine.errors import ModelError
from engine.moe_config import MoeConfig, moe_config
from engine.quantisation import BLOCK, WeightFormat, checkpoint_format

# transformers' rope_theta where no key gives one.
_DEFAULT_THETA = 10_000.0
_MIXTRAL_THETA = 1_000_000.0


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
    """Everything the decoder needs to know.

    intermediate_size: of the dense layers; moe: the experts of the others, None without any.
    """

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
    checkpoint_format: WeightFormat = WeightFormat.PLAIN
    moe: MoeConfig | None = None

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
            config = cls._build(raw, refuse(raw), _eos_token_ids(raw))
            config.check()
        except KeyError as error:
            raise ModelError(f"{path}: {error.args[0]} is missing") from error
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
        except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise ModelError(f"{path}: a value has the wrong type: {error}") from error
        return config._with_generation(model_dir / "generation_config.json")

    def check(self) -> None:
        """ModelError if sizes do not fit each other."""
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.checkpoint_format is WeightFormat.BLOCK:
            self._check_blocks()
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ModelError(
                    f"eos_token_id {token_id} is not in the vocabulary of {self.vocab_size}"
                )

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.moe is not None and layer in self.moe.sparse_layers

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys, and of all values."""
        return self.num_kv_heads * self.head_dim

    def _with_generation(self, path: Path) -> ModelConfig:
        """Adds the EOS ids of generation_config.json, where there is one."""
        if not path.is_file():
            return self
        raw = _read_json(path)
        try:
            ids = _eos_token_ids(raw)
            config = replace(self, eos_token_ids=self.eos_token_ids | ids)
            config.check()
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
        return config

    def _check_blocks(self) -> None:
        """Scales of 128 x 128 blocks: no block may reach over two parts of a fused weight."""
        sizes = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "query heads * head_dim": self.q_size,
            "key heads * head_dim": self.kv_size,
        }
        if self.moe is not None:
            sizes["an expert's intermediate size"] = self.moe.intermediate_size
        for name, size in sizes.items():
            if size % BLOCK:
                raise ModelError(
                    f"{name} is {size}; block-scaled FP8 weights need a multiple of {BLOCK}"
                )

    @classmethod
    def _build(cls, raw: Mapping[str, Any], architecture: str, eos: frozenset[int]) -> ModelConfig:
        num_heads = positive_int("num_attention_heads", raw["num_attention_heads"])
        hidden_size = positive_int("hidden_size", raw["hidden_size"])
        # Only Llama's default is one KV head a head; elsewhere an absent key means another number.
        llama = architecture == "LlamaForCausalLM"
        num_kv_heads = raw.get("num_key_value_heads") if llama else raw["num_key_value_heads"]
        qwen3 = architecture == "Qwen3ForCausalLM"
        head_dim = raw["head_dim"] if qwen3 else raw.get("head_dim")
        if head_dim is None and not qwen3:
            head_dim = hidden_size // num_heads
        num_layers = positive_int("num_hidden_layers", raw["num_hidden_layers"])
        attention_bias = flag(raw, "attention_bias")
        tie_embeddings = flag(raw, "tie_word_embeddings")
        return cls(
            architecture=architecture,
            vocab_size=positive_int("vocab_size", raw["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=positive_int("intermediate_size", raw["intermediate_size"]),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=positive_int(
                "num_key_value_heads", num_heads if num_kv_heads is None else num_kv_heads
            ),
            head_dim=positive_int("head_dim", head_dim),
            rms_norm_eps=positive_float("rms_norm_eps", raw["rms_norm_eps"]),
            rope=_rope(raw, architecture),
            context_len=positive_int("max_position_embeddings", raw["max_position_embeddings"]),
            tie_embeddings=tie_embeddings,
            qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
            output_bias=architecture != "Qwen2ForCausalLM" and attention_bias,
            mlp_bias=flag(raw, "mlp_bias"),
            qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            eos_token_ids=eos,
            checkpoint_format=checkpoint_format(raw, tie_embeddings=tie_embeddings),
            moe=moe_config(raw, architecture, num_layers),
        )


def _rope(raw: Mapping[str, Any], architecture: str) -> RopeConfig:
    """Both spellings: rope_theta + rope_scaling, and transformers 5's rope_parameters."""
    source, scaling = _rope_parameters(raw)
    per_layer = sorted(name for name, value in scaling.items() if isinstance(value, dict))
    if per_layer:
        raise ModelError(f"{source} per layer type ({per_layer}) is not supported")
    default = _MIXTRAL_THETA if architecture == "MixtralForCausalLM" else _DEFAULT_THETA
    theta = scaling.get("rope_theta", raw.get("rope_theta", default))
    theta = positive_float("rope_theta", theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    refuse_option("partial_rotary_factor", scaling)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "llama3":
        raise ModelError(
            f"{source}: rope_type {kind!r} is not supported; supported: default, llama3"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (positive_float(f"{source}.{name}", scaling[name]) for name in names)
    if factor < 1.0 or not low < high:
        raise ModelError(
            f"{source}: factor {factor} must be at least 1 and low_freq_factor {low} less than "
            f"high_freq_factor {high}"
        )
    # The key beside the object comes first, then the one in it.
    name, context_len = "original_max_position_embeddings", raw["max_position_embeddings"]
    original = raw.get(name, scaling.get(name, context_len))
    return RopeConfig(
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context_len=positive_int(name, original),
    )


def _rope_parameters(raw: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key and its object: rope_scaling in place of rope_parameters, never a mixture.

    Source: transformers' RotaryEmbeddingConfigMixin.convert_rope_params_to_dict.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            raise ModelError(f"{name} is {raw[name]!r}; it must be an object or null")
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    return name, raw.get(name) or {}


def _eos_token_ids(raw: Mapping[str, Any]) -> frozenset[int]:
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ModelError(f"eos_token_id is {value!r}; it must be an integer or a list of them")
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value
