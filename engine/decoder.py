"""One decoder for every supported architecture, driven by ModelConfig.

Owns the order of operations; the arithmetic is in kernels.ops. Holds no request state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.batch import Batch
from engine.config import ModelConfig
from engine.gqa import GroupedAttention, LayerAttention
from engine.mla import LatentAttention
from engine.mlp import DenseMlp, Mlp, Rows, SparseMlp
from engine.quantisation import WeightFormat
from engine.rope import inverse_frequencies
from engine.weights import Parameters
from kernels import ops

# How activations are quantised in front of weights of a format.
_QUANTISE: dict[WeightFormat, ops.Quantise | None] = {
    WeightFormat.PLAIN: None,
    WeightFormat.CHANNEL: "token",
    WeightFormat.BLOCK: "group",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Parameters of one layer's attention and norms, and its feed-forward."""

    input_norm: torch.Tensor
    attention: LayerAttention
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
        self._rope_tables = self._make_rope_tables(context_len or config.context_len)
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

    def _make_rope_tables(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_positions, width of what is rotated] each."""
        mla, rope = self._config.mla, self._config.rope
        width = self._config.head_dim if mla is None else mla.rope_dim
        return ops.rope_tables(
            inverse_frequencies(rope, width).to(self._embed.device),
            num_positions,
            self._embed.dtype,
            1.0 if rope.yarn is None else rope.yarn.table_scale,
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
            x = self._attend(index, x, batch, pages)
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

    def _attend(
        self, index: int, x: Rows, batch: Batch, pages: ops.KvPages
    ) -> torch.Tensor | ops.Product:
        attention = self._layers[index].attention
        query = attention.write(x, batch, pages, index)
        if batch.on_written is not None and index == len(self._layers) - 1:
            batch.on_written()
        return attention.attend(query, batch, pages, index)

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
            attention=self._attention(parameters, prefix),
            post_norm=parameters[prefix + "post_norm"],
            mlp=self._mlp(parameters, index, prefix),
        )

    def _attention(self, parameters: Parameters, prefix: str) -> LayerAttention:
        config = self._config
        output = self._weight(parameters, prefix + "o")
        if config.mla is None:
            return GroupedAttention(
                config,
                self._weight(parameters, prefix + "qkv"),
                output,
                (parameters.get(prefix + "q_norm"), parameters.get(prefix + "k_norm")),
                self._rope_tables,
                dtype=self.dtype,
                quantise=self._quantise,
            )
        names = ("q",) if config.mla.q_rank is None else ("q_a", "q")
        return LatentAttention(
            config.mla,
            query=tuple(self._weight(parameters, prefix + name) for name in names),
            q_norm=parameters.get(prefix + "q_a_norm"),
            kv=self._weight(parameters, prefix + "kv_a"),
            kv_norm=parameters[prefix + "kv_a_norm"],
            up=self._weight(parameters, prefix + "kv_b"),
            output=output,
            tables=self._rope_tables,
            tiles=self._tiles,
            quantise=self._quantise,
        )

    def _mlp(self, parameters: Parameters, index: int, prefix: str) -> Mlp:
        kinds: dict[str, Any] = {"dtype": self.dtype, "quantise": self._quantise}
        moe = self._config.moe

        def dense(name: str) -> DenseMlp:
            weights = (self._weight(parameters, prefix + name + n) for n in ("gate_up", "down"))
            return DenseMlp(*weights, **kinds)

        if moe is None or not self._config.is_sparse(index):
            return dense("")
        gate_up, down = (
            ops.prepare_stack(parameters[name], parameters.get(f"{name}.scale"), self._tiles)
            for name in (f"{prefix}experts_gate_up", f"{prefix}experts_down")
        )
        router = self._weight(parameters, prefix + "router")
        return SparseMlp(
            moe,
            router,
            gate_up,
            down,
            align=self._align,
            correction=parameters.get(prefix + "router_correction"),
            shared=dense("shared_") if moe.shared_size else None,
            **kinds,
        )

    def _weight(self, parameters: Parameters, name: str) -> ops.Weight:
        scales, bias = parameters.get(f"{name}.scale"), parameters.get(f"{name}.bias")
        values, tables = parameters[name], self._tables
        return ops.prepare_weight(values, scales, bias, self._tiles, tables=tables)
