"""Writes new keys and values into their paged slots."""

from __future__ import annotations

import torch

from kernels.fp8_quant import quantise
from kernels.kv_pages import KvPages


def kv_write(
    cache: torch.Tensor,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Stores key, value [num_tokens, num_kv_heads, head_dim] at (block, offset) of each token.

    cache: [num_blocks, num_kv_heads, num_layers, 2, block_tokens, head_dim]; block_ids, offsets:
    [num_tokens] int64. Rows of key and value after num_tokens (padding of the batch) are not read.
    """
    num_tokens = block_ids.shape[0]
    # [num_blocks, block_tokens, 2, num_kv_heads, head_dim]: both indexed dimensions stand first.
    slots = cache[:, :, layer].permute(0, 3, 2, 1, 4)
    slots[:, :, 0].index_put_((block_ids, offsets), key[:num_tokens])
    slots[:, :, 1].index_put_((block_ids, offsets), value[:num_tokens])


def write_pages(
    pages: KvPages,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """kv_write into pages, quantised per token and head if they have scales.

    A negative block id marks a padding row: nothing is written.
    """
    key, value = key[: block_ids.shape[0]], value[: block_ids.shape[0]]
    kept = block_ids >= 0
    if not kept.all():
        key, value, block_ids, offsets = key[kept], value[kept], block_ids[kept], offsets[kept]
    if pages.scales is None:
        kv_write(pages.values, layer, key, value, block_ids, offsets)
        return
    heads = key.shape[1]
    scales = pages.scales[:, :, layer].permute(0, 3, 2, 1)  # [num_blocks, tokens, 2, num_kv_heads]
    # As bytes: torch has no indexed store of FP8.
    slots = pages.values.view(torch.uint8)[:, :, layer].permute(0, 3, 2, 1, 4)
    for index, x in enumerate((key, value)):
        rows = quantise(x.reshape(-1, x.shape[-1]))
        stored = rows.values.view(torch.uint8).view(x.shape)
        slots[:, :, index].index_put_((block_ids, offsets), stored)
        scales[:, :, index].index_put_((block_ids, offsets), rows.scales.view(-1, heads))
