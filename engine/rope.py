"""Rotary embedding: what config.json says of it, and the frequencies that follow.

Owns both spellings of its keys, as transformers reads them. Never rotates anything; kernels/rope.py
does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.config_check import DEEPSEEK, flag, positive_float, positive_int, refuse_option
from engine.errors import ModelError

# transformers' rope_theta where no key gives one.
_DEFAULT_THETA = 10_000.0
_MIXTRAL_THETA = 1_000_000.0
_MSCALES = ("mscale", "mscale_all_dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """Yarn (Peng et al., 2023): low and high rotations bound the frequencies that are blended.

    table_scale: of cosines and sines; softmax_scale: of attention's scores, beside the usual one.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_context_len: int
    table_scale: float
    softmax_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base, and the llama3 frequency scaling when `factor` is not 1, or yarn."""

    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_len: int = 0
    yarn: YarnConfig | None = None


def rope_config(raw: Mapping[str, Any], architecture: str) -> RopeConfig:
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
    scaled = "yarn" if architecture in DEEPSEEK else "llama3"
    if kind != scaled:
        raise ModelError(
            f"{source}: rope_type {kind!r} is not supported; supported: default, {scaled}"
        )
    # The key beside the object comes first, then the one in it.
    name, context_len = "original_max_position_embeddings", raw["max_position_embeddings"]
    original = positive_int(name, raw.get(name, scaling.get(name, context_len)))
    if kind == "yarn":
        return RopeConfig(theta=theta, yarn=_yarn(source, scaling, original))
    return _llama3(source, scaling, theta, original)


def _llama3(source: str, scaling: Mapping[str, Any], theta: float, original: int) -> RopeConfig:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (positive_float(f"{source}.{name}", scaling[name]) for name in names)
    if factor < 1.0 or not low < high:
        raise ModelError(
            f"{source}: factor {factor} must be at least 1 and low_freq_factor {low} less than "
            f"high_freq_factor {high}"
        )
    return RopeConfig(
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context_len=original,
    )


def _yarn(source: str, scaling: Mapping[str, Any], original: int) -> YarnConfig:
    """As transformers' _compute_yarn_parameters, and DeepSeek's scale of the softmax."""

    def optional(name: str, default: float) -> float:
        value = scaling.get(name)
        return default if value is None else positive_float(f"{source}.{name}", value)

    factor = positive_float(f"{source}.factor", scaling["factor"])
    if factor < 1.0:
        raise ModelError(f"{source}: factor {factor} must be at least 1")
    # 0 stands for absent, as transformers takes it.
    one, all_dims = (optional(n, 0.0) if scaling.get(n) else 0.0 for n in _MSCALES)
    table_scale = _mscale(factor, 1.0)
    if one and all_dims:
        table_scale = _mscale(factor, one) / _mscale(factor, all_dims)
    return YarnConfig(
        factor=factor,
        beta_fast=optional("beta_fast", 32.0),
        beta_slow=optional("beta_slow", 1.0),
        truncate=flag({"truncate": True, **scaling}, "truncate"),
        original_context_len=original,
        table_scale=optional("attention_factor", table_scale),
        softmax_scale=_mscale(factor, all_dims) ** 2 if all_dims else 1.0,
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _rope_parameters(raw: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key and its object: rope_scaling in place of rope_parameters, never a mixture.

    Source: transformers' RotaryEmbeddingConfigMixin.convert_rope_params_to_dict.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            raise ModelError(f"{name} is {raw[name]!r}; it must be an object or null")
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    return name, raw.get(name) or {}


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] fp32; scaled as Llama 3.1 (transformers' llama3 rope type) or by yarn."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (rope.theta**exponent)
    if rope.yarn is not None:
        return _yarn_frequencies(rope.yarn, rope.theta, inv_freq)
    if rope.factor == 1.0:
        return inv_freq
    wavelength = 2 * math.pi / inv_freq
    low = rope.original_context_len / rope.low_freq_factor
    high = rope.original_context_len / rope.high_freq_factor
    smooth = (rope.original_context_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelength > low, inv_freq / rope.factor, inv_freq)
    medium = (wavelength <= low) & (wavelength >= high)
    return torch.where(medium, blended, scaled)


def _yarn_frequencies(yarn: YarnConfig, theta: float, inv_freq: torch.Tensor) -> torch.Tensor:
    """Fast dimensions keep their frequency, slow ones divide it by factor, a ramp in between."""
    num_pairs = inv_freq.shape[0]

    def dimension(num_rotations: float) -> float:
        turns = yarn.original_context_len / (num_rotations * 2 * math.pi)
        return num_pairs * math.log(turns) / math.log(theta)

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    ramp = (torch.arange(num_pairs, dtype=torch.float32) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return inv_freq / yarn.factor * slow + inv_freq * (1 - slow)
