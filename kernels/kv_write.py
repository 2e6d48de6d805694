"""Writes new keys and values into their paged slots."""

from __future__ import annotations

import torch


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
    [num_tokens] int64.
    """
    cache[block_ids, :, layer, 0, offsets] = key
    cache[block_ids, :, layer, 1, offsets] = value
