"""The parameters of one decoder layer: our names, their shapes, the checkpoint's names.

Owns the table from a configuration to parameters. Never allocates, never reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import ModelConfig
from engine.mla_config import MlaConfig

_ATTENTION = "self_attn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One parameter: parts of the checkpoint, `rows` of each, one above the other.

    columns: none for a vector; num_experts: as many of it are stacked, and `{}` in parts is the
    expert's number; is_projection: may be stored as FP8; is_wide: kept in fp32; suffix: of the
    tensor's name behind a part.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    has_bias: bool = False
    num_experts: int | None = None
    is_projection: bool = True
    is_wide: bool = False
    suffix: str = "weight"


def layer_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """Shapes by our name of a layer's parameters."""
    return {
        **(_attention(config) if config.mla is None else _latent_attention(config, config.mla)),
        "input_norm": Shape(parts=("input_layernorm",), rows=(config.hidden_size,)),
        "post_norm": Shape(parts=("post_attention_layernorm",), rows=(config.hidden_size,)),
        **(_sparse(config) if config.is_sparse(layer) else _dense(config)),
    }


def _attention(config: ModelConfig) -> dict[str, Shape]:
    q_size, kv_size, hidden = config.q_size, config.kv_size, config.hidden_size
    shapes = {
        "qkv": Shape(
            parts=tuple(f"{_ATTENTION}.{name}_proj" for name in "qkv"),
            rows=(q_size, kv_size, kv_size),
            columns=(hidden,),
            has_bias=config.qkv_bias,
        ),
        "o": Shape(
            parts=(f"{_ATTENTION}.o_proj",),
            rows=(hidden,),
            columns=(q_size,),
            has_bias=config.output_bias,
        ),
    }
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            shapes[name] = Shape(parts=(f"{_ATTENTION}.{name}",), rows=(config.head_dim,))
    return shapes


def _latent_attention(config: ModelConfig, mla: MlaConfig) -> dict[str, Shape]:
    hidden, num_heads = config.hidden_size, config.num_heads

    def projection(name: str, num_rows: int, width: int, *, has_bias: bool = False) -> Shape:
        parts = (f"{_ATTENTION}.{name}",)
        return Shape(parts=parts, rows=(num_rows,), columns=(width,), has_bias=has_bias)

    kv_size = num_heads * (mla.nope_dim + mla.v_dim)
    shapes = {
        "kv_a": projection("kv_a_proj_with_mqa", mla.latent_dim, hidden, has_bias=mla.has_bias),
        "kv_a_norm": Shape(parts=(f"{_ATTENTION}.kv_a_layernorm",), rows=(mla.kv_rank,)),
        "kv_b": projection("kv_b_proj", kv_size, mla.kv_rank),
        "o": projection("o_proj", hidden, num_heads * mla.v_dim, has_bias=mla.has_bias),
    }
    q_size = num_heads * mla.query_dim
    if mla.q_rank is None:
        return {"q": projection("q_proj", q_size, hidden), **shapes}
    return {
        "q_a": projection("q_a_proj", mla.q_rank, hidden, has_bias=mla.has_bias),
        "q_a_norm": Shape(parts=(f"{_ATTENTION}.q_a_layernorm",), rows=(mla.q_rank,)),
        "q": projection("q_b_proj", q_size, mla.q_rank),
        **shapes,
    }


def _dense(config: ModelConfig) -> dict[str, Shape]:
    return _mlp("", "mlp", config.hidden_size, config.intermediate_size, config.mlp_bias)


def _mlp(name: str, module: str, hidden: int, inner: int, has_bias: bool) -> dict[str, Shape]:
    """gate_up and down behind a name of ours."""
    return {
        f"{name}gate_up": Shape(
            parts=(f"{module}.gate_proj", f"{module}.up_proj"),
            rows=(inner, inner),
            columns=(hidden,),
            has_bias=has_bias,
        ),
        f"{name}down": Shape(
            parts=(f"{module}.down_proj",), rows=(hidden,), columns=(inner,), has_bias=has_bias
        ),
    }


def _sparse(config: ModelConfig) -> dict[str, Shape]:
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    inner = moe.intermediate_size
    gate, up, down = (f"{moe.experts}.{{}}.{part}" for part in moe.parts)
    shapes = {
        "router": Shape(
            parts=(moe.router,),
            rows=(moe.num_experts,),
            columns=(hidden,),
            is_projection=False,
            is_wide=moe.wide_router,
        ),
        "experts_gate_up": Shape(
            parts=(gate, up), rows=(inner, inner), columns=(hidden,), num_experts=moe.num_experts
        ),
        "experts_down": Shape(
            parts=(down,), rows=(hidden,), columns=(inner,), num_experts=moe.num_experts
        ),
    }
    if moe.biased:
        shapes["router_correction"] = Shape(
            parts=(moe.router,),
            rows=(moe.num_experts,),
            is_wide=True,
            suffix="e_score_correction_bias",
        )
    if moe.shared_size:
        shapes |= _mlp("shared_", "mlp.shared_experts", hidden, moe.shared_size, has_bias=False)
    return shapes
