"""The model's shape and arithmetic, read from config.json.

Owns how sizes follow from the keys, as transformers reads them; rotary embedding, experts and MLA
have files of their own, what is refused is in engine/config_check.py. Never reads weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config_check import (
    flag,
    non_negative_int,
    positive_float,
    positive_int,
    refuse,
)
from engine.errors import ModelError
from engine.mla_config import MlaConfig, mla_config
from engine.moe_config import MoeConfig, moe_config
from engine.quantisation import BLOCK, WeightFormat, checkpoint_format
from engine.rope import RopeConfig, rope_config


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the decoder needs to know.

    intermediate_size: of the dense layers; moe: the experts of the others, None without any. With
    mla num_kv_heads and head_dim are those of the cache: one head of latents. num_extra_layers: of
    a checkpoint, behind the last one, for multi-token prediction, and not read.
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
    mla: MlaConfig | None = None
    num_extra_layers: int = 0

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
        if self.mla is None and self.head_dim % 2:
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
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        if self.mla is None:
            sizes["query heads * head_dim"] = self.q_size
            sizes["key heads * head_dim"] = self.kv_size
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
        num_layers = positive_int("num_hidden_layers", raw["num_hidden_layers"])
        rope = rope_config(raw, architecture)
        mla = mla_config(raw, architecture, rope)
        num_kv_heads, head_dim = _kv_shape(raw, architecture, mla)
        attention_bias = flag(raw, "attention_bias")
        tie_embeddings = flag(raw, "tie_word_embeddings")
        return cls(
            architecture=architecture,
            vocab_size=positive_int("vocab_size", raw["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=positive_int("intermediate_size", raw["intermediate_size"]),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=positive_float("rms_norm_eps", raw["rms_norm_eps"]),
            rope=rope,
            context_len=positive_int("max_position_embeddings", raw["max_position_embeddings"]),
            tie_embeddings=tie_embeddings,
            qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
            output_bias=architecture != "Qwen2ForCausalLM" and attention_bias,
            mlp_bias=flag(raw, "mlp_bias"),
            qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            eos_token_ids=eos,
            checkpoint_format=checkpoint_format(raw, tie_embeddings=tie_embeddings),
            moe=moe_config(raw, architecture, num_layers),
            mla=mla,
            num_extra_layers=non_negative_int(
                "num_nextn_predict_layers", raw.get("num_nextn_predict_layers", 0)
            ),
        )


def _kv_shape(raw: Mapping[str, Any], architecture: str, mla: MlaConfig | None) -> tuple[int, int]:
    """(KV heads, values of each) that the cache keeps."""
    if mla is not None:
        return 1, mla.latent_dim
    num_heads, name = raw["num_attention_heads"], "num_key_value_heads"
    # Only Llama's default is one KV head a head; elsewhere an absent key means another number.
    num_kv_heads = raw.get(name) if architecture == "LlamaForCausalLM" else raw[name]
    qwen3 = architecture == "Qwen3ForCausalLM"
    head_dim = raw["head_dim"] if qwen3 else raw.get("head_dim")
    if head_dim is None and not qwen3:
        head_dim = raw["hidden_size"] // num_heads
    return (
        positive_int(name, num_heads if num_kv_heads is None else num_kv_heads),
        positive_int("head_dim", head_dim),
    )


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
