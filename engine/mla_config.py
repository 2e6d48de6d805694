"""Multi-head latent attention (MLA) of DeepSeek-V2 and V3, read from config.json.

Owns its keys. Never reads weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config_check import DEEPSEEK, flag, positive_int
from engine.errors import ModelError
from engine.rope import RopeConfig

EPS = 1e-6
"""Of the norms inside MLA, whatever rms_norm_eps says (transformers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """Widths of MLA. A head's query and key have nope_dim values without and rope_dim with rotary
    embedding; its value has v_dim.

    q_rank: of the query's own compression, None without one; kv_rank: of the latent that stands for
    all heads' keys and values; interleaved: pairs of rotary embedding are neighbours.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    interleaved: bool
    softmax_scale: float
    has_bias: bool

    @property
    def latent_dim(self) -> int:
        """Values that the cache keeps of a token: the latent, then the rotated key."""
        return self.kv_rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        """Of one head, as the projection makes it."""
        return self.nope_dim + self.rope_dim


def mla_config(raw: Mapping[str, Any], architecture: str, rope: RopeConfig) -> MlaConfig | None:
    """None for another architecture; KeyError or ModelError name what is missing or wrong."""
    if architecture not in DEEPSEEK:
        return None
    heads, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ModelError(
            f"num_key_value_heads {kv_heads} is not supported with MLA; num_attention_heads is "
            f"{heads}"
        )
    rope_dim = positive_int("qk_rope_head_dim", raw["qk_rope_head_dim"])
    if rope_dim % 2:
        raise ModelError(f"qk_rope_head_dim {rope_dim} is odd; rotary embedding needs pairs")
    nope_dim = positive_int("qk_nope_head_dim", raw["qk_nope_head_dim"])
    # null, not absent: without the key transformers takes a rank.
    q_rank = raw["q_lora_rank"]
    scale = 1.0 if rope.yarn is None else rope.yarn.softmax_scale
    v2 = architecture == "DeepseekV2ForCausalLM"
    return MlaConfig(
        q_rank=None if q_rank is None else positive_int("q_lora_rank", q_rank),
        kv_rank=positive_int("kv_lora_rank", raw["kv_lora_rank"]),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=positive_int("v_head_dim", raw["v_head_dim"]),
        interleaved=v2 or flag({"rope_interleave": True, **raw}, "rope_interleave"),
        softmax_scale=(nope_dim + rope_dim) ** -0.5 * scale,
        has_bias=flag(raw, "attention_bias"),
    )
