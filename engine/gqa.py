"""Multi-head attention with grouped KV heads (GQA), and what every kind of attention offers.

Owns the order of its operations; the arithmetic is in kernels.ops. Holds no request state.
"""

from __future__ import annotations

from typing import Protocol

import torch

from engine.batch import Batch
from engine.config import ModelConfig
from engine.mlp import Rows, quantised
from kernels import ops


class LayerAttention(Protocol):
    """Attention of one layer: first KV goes to the pages, then queries look at them."""

    def write(self, x: Rows, batch: Batch, pages: ops.KvPages, layer: int) -> torch.Tensor:
        """x [num_rows, hidden_size] -> queries [num_rows, num_heads, head_dim of the cache]."""
        ...

    def attend(
        self, query: torch.Tensor, batch: Batch, pages: ops.KvPages, layer: int
    ) -> torch.Tensor | ops.Product:
        """query, as `write` returned it -> [num_rows, hidden_size], before the residual."""
        ...


class GroupedAttention:
    """q|k|v in one product, norms of heads where the model has them, rotary embedding."""

    def __init__(
        self,
        config: ModelConfig,
        qkv: ops.Weight,
        output: ops.Weight,
        norms: tuple[torch.Tensor | None, torch.Tensor | None],
        tables: tuple[torch.Tensor, torch.Tensor],
        *,
        dtype: torch.dtype,
        quantise: ops.Quantise | None,
    ) -> None:
        """norms: of queries and keys, both or none; tables: see ops.rope_tables."""
        self._config, self._qkv, self._output = config, qkv, output
        self._norms, self._tables, self._dtype = norms, tables, dtype
        self._quantise: ops.Quantise | None = quantise

    def write(self, x: Rows, batch: Batch, pages: ops.KvPages, layer: int) -> torch.Tensor:
        """See LayerAttention."""
        return ops.qkv_finish(
            ops.linear(x, self._qkv, dtype=self._dtype, partial=True, pdl=batch.pdl),
            q_norm=self._norms[0],
            k_norm=self._norms[1],
            eps=self._config.rms_norm_eps,
            cos=self._tables[0],
            sin=self._tables[1],
            positions=batch.positions,
            block_ids=batch.block_ids,
            offsets=batch.offsets,
            pages=pages,
            layer=layer,
            num_heads=self._config.num_heads,
            num_kv_heads=self._config.num_kv_heads,
            pdl=batch.pdl,
        )

    def attend(
        self, query: torch.Tensor, batch: Batch, pages: ops.KvPages, layer: int
    ) -> torch.Tensor | ops.Product:
        """See LayerAttention."""
        scale = self._config.head_dim**-0.5
        attended = batch.attention.attend(query, pages, layer, scale)
        rows = quantised(attended, self._quantise, pdl=batch.pdl)
        return ops.linear(rows, self._output, dtype=self._dtype, partial=True, pdl=batch.pdl)
