"""The parameters of one decoder layer: our names, their shapes, the checkpoint's names.

Owns the table from a configuration to parameters. Never allocates, never reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import ModelConfig

_ATTENTION = "self_attn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One parameter: parts of the checkpoint, `rows` of each, one above the other.

    columns: none for a vector; num_experts: as many of it are stacked, and `{}` in parts is the
    expert's number; is_projection: may be stored as FP8.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    has_bias: bool = False
    num_experts: int | None = None
    is_projection: bool = True


def layer_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """Shapes by our name of a layer's parameters."""
    return {
        **_attention(config),
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


def _dense(config: ModelConfig) -> dict[str, Shape]:
    hidden, inner, has_bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    return {
        "gate_up": Shape(
            parts=("mlp.gate_proj", "mlp.up_proj"),
            rows=(inner, inner),
            columns=(hidden,),
            has_bias=has_bias,
        ),
        "down": Shape(
            parts=("mlp.down_proj",), rows=(hidden,), columns=(inner,), has_bias=has_bias
        ),
    }


def _sparse(config: ModelConfig) -> dict[str, Shape]:
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    inner = moe.intermediate_size
    gate, up, down = (f"{moe.experts}.{{}}.{part}" for part in moe.parts)
    return {
        "router": Shape(
            parts=(moe.router,), rows=(moe.num_experts,), columns=(hidden,), is_projection=False
        ),
        "experts_gate_up": Shape(
            parts=(gate, up), rows=(inner, inner), columns=(hidden,), num_experts=moe.num_experts
        ),
        "experts_down": Shape(
            parts=(down,), rows=(hidden,), columns=(inner,), num_experts=moe.num_experts
        ),
    }
