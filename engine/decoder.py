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
    """One step's ragged batch, padded to a multiple of ops.ROW_TILE rows.

    token_ids, positions: [num_rows] int64; block_ids, offsets: [num_tokens] int64, where the KV of
    the first num_tokens rows goes; the other rows are padding. groups cover the num_tokens rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    block_ids: torch.Tensor
    offsets: torch.Tensor
    groups: list[ops.Group]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """weight [N, K], bias [N]; tiles: see ops.exact_tiles."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    tiles: tuple[int, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias, tiles=self.tiles)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Parameters of one layer; qk_norm [num_heads + num_kv_heads, head_dim]."""

    input_norm: torch.Tensor
    qkv: _Linear
    qk_norm: torch.Tensor | None
    output: _Linear
    post_norm: torch.Tensor
    gate_up: _Linear
    down: _Linear


class Decoder:
    """Llama, Mistral, Qwen2 and Qwen3, as their transformers implementations compute them."""

    def __init__(
        self, config: ModelConfig, parameters: Parameters, *, context_len: int | None = None
    ) -> None:
        """context_len: positions to prepare for; the model's own limit without it."""
        self._config = config
        self._embed, self._norm = parameters["embed"], parameters["norm"]
        self._tiles: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._head = self._linear(parameters, "head")
        self._layers = [self._layer(parameters, index) for index in range(config.num_layers)]
        # [context_len, head_dim]
        self._cos, self._sin = ops.rope_tables(
            inverse_frequencies(config.rope, config.head_dim).to(self._embed.device),
            context_len or config.context_len,
            self._embed.dtype,
        )

    def forward(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last norm, [num_rows, hidden_size]; writes KV into cache."""
        eps = self._config.rms_norm_eps
        cos = self._cos[batch.positions][:, None]  # [num_rows, 1, head_dim]
        sin = self._sin[batch.positions][:, None]
        residual = self._embed[batch.token_ids]
        normed = ops.rmsnorm(residual, self._layers[0].input_norm, eps)
        next_norms = [*(layer.input_norm for layer in self._layers[1:]), self._norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, next_norms, strict=True)):
            attended = self._attention(index, normed, cos, sin, batch, cache)
            normed, residual = ops.add_rmsnorm(attended, residual, layer.post_norm, eps)
            fed = layer.down(ops.silu_mul(layer.gate_up(normed)))
            normed, residual = ops.add_rmsnorm(fed, residual, next_norm, eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [num_rows, hidden_size] -> [num_rows, vocab_size] fp32."""
        return self._head(hidden).float()

    def _attention(
        self,
        index: int,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Batch,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        config, layer = self._config, self._layers[index]
        num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = layer.qkv(x).view(x.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        qk, value = qkv[:, :-num_kv_heads], qkv[:, -num_kv_heads:]
        if layer.qk_norm is not None:
            qk = ops.rmsnorm(qk, layer.qk_norm, config.rms_norm_eps)
        qk = ops.rope(qk, cos, sin)
        ops.kv_write(cache, index, qk[:, num_heads:], value, batch.block_ids, batch.offsets)
        attended = ops.paged_attention(
            qk[:, :num_heads], cache, index, batch.groups, head_dim**-0.5
        )
        return layer.output(attended.reshape(x.shape[0], num_heads * head_dim))

    def _layer(self, parameters: Parameters, index: int) -> _Layer:
        prefix, config = f"layers.{index}.", self._config
        qk_norm = None
        if config.qk_norm:
            q_norm, k_norm = parameters[prefix + "q_norm"], parameters[prefix + "k_norm"]
            qk_norm = torch.stack([q_norm] * config.num_heads + [k_norm] * config.num_kv_heads)
        return _Layer(
            input_norm=parameters[prefix + "input_norm"],
            qkv=self._linear(parameters, prefix + "qkv"),
            qk_norm=qk_norm,
            output=self._linear(parameters, prefix + "o"),
            post_norm=parameters[prefix + "post_norm"],
            gate_up=self._linear(parameters, prefix + "gate_up"),
            down=self._linear(parameters, prefix + "down"),
        )

    def _linear(self, parameters: Parameters, name: str) -> _Linear:
        weight = parameters[name]
        shape = tuple(weight.shape)
        if shape not in self._tiles:
            self._tiles[shape] = ops.exact_tiles(weight)
        return _Linear(weight=weight, bias=parameters.get(f"{name}.bias"), tiles=self._tiles[shape])


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] fp32; scaled as Llama 3.1 (transformers' llama3 rope type)."""
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
