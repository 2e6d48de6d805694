"""Writes new keys and values into their paged slots."""

from __future__ import annotations

from collections.abc import Sequence

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
    write_pages(KvPages(values=cache), layer, (key, value), block_ids, offsets)


def write_pages(
    pages: KvPages,
    layer: int,
    parts: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Stores the parts of axis 3 of pages, key and value or one latent, each [num_tokens or more,
    num_kv_heads, head_dim], as kv_write does; quantised per token and head if pages have scales.

    A negative block id marks a padding row: nothing is written.
    """
    parts = [part[: block_ids.shape[0]] for part in parts]
    kept = block_ids >= 0
    if not kept.all():
        parts, block_ids, offsets = [p[kept] for p in parts], block_ids[kept], offsets[kept]
    if pages.scales is None:
        slots = pages.values[:, :, layer].permute(0, 3, 2, 1, 4)
        for index, part in enumerate(parts):
            slots[:, :, index].index_put_((block_ids, offsets), part)
        return
    scales = pages.scales[:, :, layer].permute(0, 3, 2, 1)  # [num_blocks, tokens, parts, heads]
    # As bytes: torch has no indexed store of FP8.
    slots = pages.values.view(torch.uint8)[:, :, layer].permute(0, 3, 2, 1, 4)
    for index, part in enumerate(parts):
        rows = quantise(part.reshape(-1, part.shape[-1]))
        stored = rows.values.view(torch.uint8).view(part.shape)
        slots[:, :, index].index_put_((block_ids, offsets), stored)
        scales[:, :, index].index_put_((block_ids, offsets), rows.scales.view(-1, part.shape[1]))
