"""One decoder for every supported architecture, driven by ModelConfig.

Owns the order of operations; the arithmetic is in kernels.ops. Holds no request state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.config import ModelConfig, RopeConfig
from engine.weights import Parameters
from kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's ragged batch; all tensors are [num_tokens] int64."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    block_ids: torch.Tensor
    offsets: torch.Tensor
    groups: list[ops.Group]


class Decoder:
    """Llama, Mistral, Qwen2 and Qwen3 (architecture reports and their transformers
    implementations).
    """

    def __init__(self, config: ModelConfig, parameters: Parameters) -> None:
        self._config = config
        self._parameters = parameters
        embed = parameters["embed"]
        self._dtype = embed.dtype
        self._inv_freq = inverse_frequencies(config.rope, config.head_dim).to(embed.device)

    def forward(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last norm, [num_tokens, hidden_size]; writes KV into cache."""
        config, p = self._config, self._parameters
        angles = batch.positions[:, None].float() * self._inv_freq[None, :]
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        cos, sin = angles.cos().to(self._dtype), angles.sin().to(self._dtype)
        residual = p["embed"][batch.token_ids]
        normed = ops.rmsnorm(residual, p["layers.0.input_norm"], config.rms_norm_eps)
        for layer in range(config.num_layers):
            attended = self._attention(layer, normed, cos, sin, batch, cache)
            prefix = f"layers.{layer}."
            normed, residual = ops.add_rmsnorm(
                attended, residual, p[prefix + "post_norm"], config.rms_norm_eps
            )
            gate_up = ops.linear(normed, p[prefix + "gate_up"], p.get(prefix + "gate_up.bias"))
            fed = ops.linear(ops.silu_mul(gate_up), p[prefix + "down"], p.get(prefix + "down.bias"))
            last = layer + 1 == config.num_layers
            weight = p["norm"] if last else p[f"layers.{layer + 1}.input_norm"]
            normed, residual = ops.add_rmsnorm(fed, residual, weight, config.rms_norm_eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [num_rows, hidden_size] -> [num_rows, vocab_size] fp32."""
        return ops.linear(hidden, self._parameters["head"]).float()

    def _attention(
        self,
        layer: int,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Batch,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        config, p, prefix = self._config, self._parameters, f"layers.{layer}."
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = ops.linear(x, p[prefix + "qkv"], p.get(prefix + "qkv.bias"))
        q, k, v = qkv.view(x.shape[0], heads + 2 * kv_heads, dim).split(
            [heads, kv_heads, kv_heads], dim=1
        )
        if config.qk_norm:
            q = ops.rmsnorm(q, p[prefix + "q_norm"], config.rms_norm_eps)
            k = ops.rmsnorm(k, p[prefix + "k_norm"], config.rms_norm_eps)
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        ops.kv_write(cache, layer, k, v, batch.block_ids, batch.offsets)
        out = ops.paged_attention(q, cache, layer, batch.groups, dim**-0.5)
        return ops.linear(
            out.reshape(x.shape[0], heads * dim), p[prefix + "o"], p.get(prefix + "o.bias")
        )


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] fp32; with factor != 1 scaled as in Llama 3.1 (transformers' llama3 rope
    type).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (rope.theta**exponent)
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
