"""One decoder for every supported architecture, driven by ModelConfig.

Owns the order of operations; the arithmetic is in kernels.ops. Holds no request state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.attention import Attention
from engine.config import ModelConfig, RopeConfig
from engine.mlp import DenseMlp, Mlp, Rows, SparseMlp
from engine.quantisation import WeightFormat
from engine.weights import Parameters
from kernels import ops

# How activations are quantised in front of weights of a format.
_QUANTISE: dict[WeightFormat, ops.Quantise | None] = {
    WeightFormat.PLAIN: None,
    WeightFormat.CHANNEL: "token",
    WeightFormat.BLOCK: "group",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's ragged batch; on a CPU padded to a multiple of ops.ROW_TILE rows.

    token_ids, positions: [num_rows] int; block_ids, offsets: [num_tokens] int, where the KV of the
    first num_tokens rows goes; the other rows, and those with a negative block, are padding.
    With sources [num_rows] int32, a row whose source is not negative has the token
    sampled[source]. pdl: kernels may be launched under the end of the one before. on_written is
    called when the last kernel that writes KV is enqueued.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    block_ids: torch.Tensor
    offsets: torch.Tensor
    attention: Attention
    sources: torch.Tensor | None = None
    sampled: torch.Tensor | None = None
    pdl: bool = False
    on_written: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Parameters of one layer's attention and norms, and its feed-forward."""

    input_norm: torch.Tensor
    qkv: ops.Weight
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: ops.Weight
    post_norm: torch.Tensor
    mlp: Mlp


class Decoder:
    """Every supported architecture, as its transformers implementation computes it."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        *,
        context_len: int | None = None,
        weight_format: WeightFormat = WeightFormat.PLAIN,
        tables: ops.TileTables | None = None,
        rmsnorm_warps: int | None = None,
        moe_align: str = "auto",
    ) -> None:
        """context_len: positions to prepare for, the model's own limit without it; tables,
        rmsnorm_warps, moe_align: how kernels run on a GPU, see ops.prepare_weight, ops.rmsnorm and
        ops.alignment, whose ValueError may come.
        """
        self._config = config
        self._embed, self._norm = parameters["embed"], parameters["norm"]
        self._quantise: ops.Quantise | None = _QUANTISE[weight_format]
        self._tables, self._warps = tables, rmsnorm_warps
        # Only there is anything aligned: elsewhere nothing foreign is imported.
        on_gpu = config.moe is not None and self._embed.is_cuda
        self._align = ops.alignment(moe_align) if on_gpu else ops.moe_align
        self._tiles: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._head = self._weight(parameters, "head")
        self._layers = [self._layer(parameters, index) for index in range(config.num_layers)]
        # Of the embedding a step reads a row a token, unless it is the head; which experts it reads
        # the tokens decide.
        distinct = {
            id(tensor): tensor
            for name, tensor in parameters.items()
            if name != "embed" and ".experts_" not in name
        }
        self._step_num_bytes = sum(tensor.nbytes for tensor in distinct.values())
        # [context_len, head_dim]
        self._cos, self._sin = ops.rope_tables(
            inverse_frequencies(config.rope, config.head_dim).to(self._embed.device),
            context_len or config.context_len,
            self._embed.dtype,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of activations that are not quantised."""
        return self._embed.dtype

    @property
    def step_num_bytes(self) -> int:
        """Bytes of the parameters that every decode step reads in full."""
        return self._step_num_bytes

    def forward(self, batch: Batch, pages: ops.KvPages) -> torch.Tensor:
        """Hidden states after the last norm, [num_rows, hidden_size]; writes KV into pages."""
        eps, kind, pdl = self._config.rms_norm_eps, self._quantise, batch.pdl
        how: dict[str, Any] = {"warps": self._norm_warps(batch.token_ids.shape[0]), "pdl": pdl}
        residual = ops.embed(batch.token_ids, self._embed, batch.sources, batch.sampled, pdl=pdl)
        x = ops.rmsnorm(residual, self._layers[0].input_norm, eps, quantise=kind, **how)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            x = self._attention(index, x, batch, pages)
            x, residual = ops.add_rmsnorm(
                x, residual, layer.post_norm, eps, quantise=layer.mlp.input_kind, **how
            )
            x = layer.mlp.forward(x, pdl=pdl)
            norm = self._norm if index == last else self._layers[index + 1].input_norm
            kept = None if index == last else kind  # the head is not quantised
            x, residual = ops.add_rmsnorm(x, residual, norm, eps, quantise=kept, **how)
        assert isinstance(x, torch.Tensor)
        return x

    def logits(self, hidden: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
        """hidden [num_rows, hidden_size] -> [num_rows, vocab_size] in the model's dtype."""
        logits = ops.linear(hidden, self._head, pdl=pdl)
        assert isinstance(logits, torch.Tensor)
        return logits

    def _attention(
        self, index: int, x: Rows, batch: Batch, pages: ops.KvPages
    ) -> torch.Tensor | ops.Product:
        config, layer, pdl = self._config, self._layers[index], batch.pdl
        query = ops.qkv_finish(
            ops.linear(x, layer.qkv, dtype=self.dtype, partial=True, pdl=pdl),
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=config.rms_norm_eps,
            cos=self._cos,
            sin=self._sin,
            positions=batch.positions,
            block_ids=batch.block_ids,
            offsets=batch.offsets,
            pages=pages,
            layer=index,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            pdl=pdl,
        )
        if batch.on_written is not None and index == len(self._layers) - 1:
            batch.on_written()
        attended: Rows = batch.attention.attend(query, pages, index, config.head_dim**-0.5)
        if self._quantise is not None:
            group = ops.GROUP if self._quantise == "group" else None
            attended = ops.quantise(attended, group, pdl=pdl)
        return ops.linear(attended, layer.output, dtype=self.dtype, partial=True, pdl=pdl)

    def _norm_warps(self, num_rows: int) -> int | None:
        """Warps per row: the user's number, or the tile table's."""
        if self._warps is not None or self._tables is None:
            return self._warps
        key = ops.width_key(self._config.hidden_size)
        return (self._tables.at("rmsnorm", key, num_rows) or {}).get("num_warps")

    def _layer(self, parameters: Parameters, index: int) -> _Layer:
        prefix = f"layers.{index}."
        return _Layer(
            input_norm=parameters[prefix + "input_norm"],
            qkv=self._weight(parameters, prefix + "qkv"),
            q_norm=parameters.get(prefix + "q_norm"),
            k_norm=parameters.get(prefix + "k_norm"),
            output=self._weight(parameters, prefix + "o"),
            post_norm=parameters[prefix + "post_norm"],
            mlp=self._mlp(parameters, index, prefix),
        )

    def _mlp(self, parameters: Parameters, index: int, prefix: str) -> Mlp:
        kinds: dict[str, Any] = {"dtype": self.dtype, "quantise": self._quantise}
        moe = self._config.moe
        if moe is None or not self._config.is_sparse(index):
            gate_up, down = (self._weight(parameters, prefix + n) for n in ("gate_up", "down"))
            return DenseMlp(gate_up, down, **kinds)
        gate_up, down = (
            ops.prepare_experts(parameters[name], parameters.get(f"{name}.scale"), self._tiles)
            for name in (f"{prefix}experts_gate_up", f"{prefix}experts_down")
        )
        router = self._weight(parameters, prefix + "router")
        return SparseMlp(moe, router, gate_up, down, align=self._align, **kinds)

    def _weight(self, parameters: Parameters, name: str) -> ops.Weight:
        scales, bias = parameters.get(f"{name}.scale"), parameters.get(f"{name}.bias")
        values, tables = parameters[name], self._tables
        return ops.prepare_weight(values, scales, bias, self._tiles, tables=tables)


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
