"""Multi-head latent attention (DeepSeek-V2, 2024), absorbed: queries meet the latents themselves.

Owns the order of its operations; the arithmetic is in kernels.ops. The cache keeps of a token its
latent and its rotated key, one vector for all heads. A head's key is `up_key` of the latent, and
its value `up_value` of it: the first is moved over to the query, the second behind the weighted sum
of latents, so that neither keys nor values are ever made. Holds no request state.
"""

from __future__ import annotations

import torch

from engine.batch import Batch
from engine.mla_config import EPS, MlaConfig
from engine.mlp import Rows, quantised
from kernels import ops


class LatentAttention:
    """See the module; a LayerAttention."""

    def __init__(
        self,
        mla: MlaConfig,
        *,
        query: tuple[ops.Weight, ...],
        q_norm: torch.Tensor | None,
        kv: ops.Weight,
        kv_norm: torch.Tensor,
        up: ops.Weight,
        output: ops.Weight,
        tables: tuple[torch.Tensor, torch.Tensor],
        tiles: dict[tuple[int, ...], tuple[int, ...]],
        quantise: ops.Quantise | None,
    ) -> None:
        """query: one projection, or two with q_norm between them; up: all heads' keys and values of
        a latent; tables: see ops.rope_tables; tiles: see ops.prepare_weight.
        """
        self._mla, self._query, self._q_norm = mla, query, q_norm
        self._kv, self._kv_norm, self._output = kv, kv_norm, output
        self._tables, self._dtype = tables, kv_norm.dtype
        self._quantise: ops.Quantise | None = quantise
        # [num_heads, nope_dim + v_dim, kv_rank]; absorbed weights are never FP8.
        heads = up.dequantise().to(self._dtype).unflatten(0, (-1, mla.nope_dim + mla.v_dim))
        up_key, up_value = heads.split((mla.nope_dim, mla.v_dim), dim=1)
        self._up_key = ops.prepare_stack(up_key.transpose(1, 2).contiguous(), None, tiles)
        self._up_value = ops.prepare_stack(up_value.contiguous(), None, tiles)

    def write(self, x: Rows, batch: Batch, pages: ops.KvPages, layer: int) -> torch.Tensor:
        """See LayerAttention; the cache's head_dim is that of a latent and its rotated key."""
        mla = self._mla
        compressed = ops.linear(x, self._kv, dtype=self._dtype)
        latent, key = compressed.split((mla.kv_rank, mla.rope_dim), dim=1)
        latent = ops.rmsnorm(latent.contiguous(), self._kv_norm, EPS)
        key = self._rotated(key[:, None], batch.positions)
        cached = torch.cat((latent[:, None], key), dim=-1)
        ops.write_pages(pages, layer, (cached,), batch.block_ids, batch.offsets)
        # [num_rows, num_heads, nope_dim + rope_dim]
        query = self._queries(x).unflatten(1, (-1, mla.query_dim))
        plain, rotary = query.split((mla.nope_dim, mla.rope_dim), dim=-1)
        absorbed = ops.stacked_linear(plain, self._up_key)
        return torch.cat((absorbed, self._rotated(rotary, batch.positions)), dim=-1)

    def attend(
        self, query: torch.Tensor, batch: Batch, pages: ops.KvPages, layer: int
    ) -> torch.Tensor | ops.Product:
        """See LayerAttention."""
        mla = self._mla
        attended = batch.attention.attend(query, pages, layer, mla.softmax_scale)
        latents = attended.unflatten(1, (-1, mla.latent_dim))[..., : mla.kv_rank]
        values = ops.stacked_linear(latents, self._up_value).flatten(1)
        rows = quantised(values, self._quantise, pdl=batch.pdl)
        return ops.linear(rows, self._output, dtype=self._dtype, partial=True, pdl=batch.pdl)

    def _queries(self, x: Rows) -> torch.Tensor:
        """[num_rows, num_heads * query_dim]."""
        first, *second = self._query
        query = ops.linear(x, first, dtype=self._dtype)
        for weight in second:
            assert self._q_norm is not None
            normed = ops.rmsnorm(query, self._q_norm, EPS, quantise=self._quantise)
            query = ops.linear(normed, weight, dtype=self._dtype)
        return query

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [num_rows, heads, rope_dim], half-split whatever the order of its pairs was."""
        if self._mla.interleaved:
            x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
        cos, sin = (table[positions][:, None] for table in self._tables)
        return ops.rope(x, cos, sin)
