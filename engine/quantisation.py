"""FP8 weights: what a checkpoint's quantization_config says, and quantisation at load.

Owns which formats are supported: anything else is refused by name. Never reads files and never
quantises activations (kernels/fp8_quant.py does).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from engine.errors import ModelError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128
"""Rows and columns of a weight that share a scale in the block-scaled format."""

_PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    *(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")),
    *(f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")),
    *(f"block_sparse_moe.experts.0.{name}" for name in ("w1", "w2", "w3")),
)
# A row of zeros gets a finite scale.
_MIN_AMAX = 1e-12
# Values quantised at a time: fp32 temporaries stay small beside the model.
_PASS_VALUES = 1 << 24


class WeightFormat(enum.Enum):
    """How projections are stored; embeddings, norms, biases and the head keep the model's dtype.

    CHANNEL: e4m3 with a scale per output channel. BLOCK: e4m3 with a scale per 128 x 128 values.
    """

    PLAIN = "plain"
    CHANNEL = "fp8"
    BLOCK = "fp8 in blocks"


def checkpoint_format(raw: Mapping[str, Any], *, tie_embeddings: bool) -> WeightFormat:
    """The format that config.json's quantization_config describes; ModelError for any other.

    Sources: compressed-tensors 0.11 (float-quantized), transformers 5 FineGrainedFP8Config.
    """
    both = [raw[k] for k in ("quantization_config", "compression_config") if raw.get(k)]
    if not both:
        return WeightFormat.PLAIN
    if len(both) > 1 or not isinstance(both[0], Mapping):
        raise ModelError("quantization_config and compression_config: one object is expected")
    settings: Mapping[str, Any] = both[0]
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        _check_channel(settings, tie_embeddings)
        return WeightFormat.CHANNEL
    if method == "fp8":
        _check_block(settings)
        return WeightFormat.BLOCK
    raise ModelError(
        f"quantization_config: quant_method {method!r} is not supported; supported: "
        "compressed-tensors (FP8 per channel), fp8 (128 x 128 blocks)"
    )


def quantise_rows(weight: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Fills values [N, K] e4m3 and scales [N] fp32 so that values * scales is near weight [N, K].

    The scale of a row is its largest magnitude / 448; weight may be on another device.
    """
    num_rows = max(1, _PASS_VALUES // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        wide = weight[rows].to(values.device).float()
        scale = wide.abs().amax(1).clamp_min_(_MIN_AMAX) / FP8_MAX
        scales[rows] = scale
        values[rows] = wide.div_(scale[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def _check_channel(settings: Mapping[str, Any], tie_embeddings: bool) -> None:
    """compressed-tensors: float 8 bit per channel, activations dynamic per token."""
    groups = settings.get("config_groups") or {}
    if len(groups) != 1:
        raise ModelError(
            f"quantization_config: {len(groups)} config_groups; exactly 1 is supported"
        )
    (group,) = groups.values()
    _expect("targets", group.get("targets"), ["Linear"])
    _expect("format", settings.get("format", "float-quantized"), "float-quantized")
    _expect("kv_cache_scheme", settings.get("kv_cache_scheme"), None)
    _expect("output_activations", group.get("output_activations"), None)
    wanted = {"type": "float", "num_bits": 8, "symmetric": True}
    parts = {
        "weights": {**wanted, "strategy": "channel", "dynamic": False},
        "input_activations": {**wanted, "strategy": "token", "dynamic": True},
    }
    for part, expected in parts.items():
        for name, value in expected.items():
            _expect(f"{part}.{name}", (group.get(part) or {}).get(name), value)
    ignored = [str(name) for name in settings.get("ignore") or ()]
    _refuse_ignored_projections(ignored)
    if not tie_embeddings and not _matches("lm_head", ignored):
        raise ModelError(
            "quantization_config: lm_head must be ignored; an FP8 head is not supported"
        )


def _check_block(settings: Mapping[str, Any]) -> None:
    """transformers' fine-grained FP8 (DeepSeek-V3, Qwen3): dynamic activations."""
    _expect("weight_block_size", settings.get("weight_block_size"), [BLOCK, BLOCK])
    _expect("activation_scheme", settings.get("activation_scheme", "dynamic"), "dynamic")
    _expect("fmt", settings.get("fmt", "e4m3"), "e4m3")
    _refuse_ignored_projections(map(str, settings.get("modules_to_not_convert") or ()))


def _expect(name: str, value: object, expected: object) -> None:
    if value != expected:
        raise ModelError(
            f"quantization_config: {name} {value!r} is not supported; {expected!r} is expected"
        )


def _refuse_ignored_projections(ignored: Iterable[str]) -> None:
    """Every projection must be FP8; of the other modules none is, ignored or not."""
    for pattern in ignored:
        for projection in _PROJECTIONS:
            if _matches(f"model.layers.0.{projection}", [pattern]) or projection in pattern:
                raise ModelError(
                    f"quantization_config: {pattern!r} leaves projections unquantised; "
                    "a mixture is not supported"
                )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """compressed-tensors: a name, the end of a name's module path, or "re:" and an expression."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                if re.match(pattern[3:], name):
                    return True
            except re.error as error:
                raise ModelError(f"quantization_config: ignore {pattern!r}: {error}") from error
        elif name == pattern or name.startswith(f"{pattern}."):
            return True
    return False
