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
    [num_tokens] int64. Rows of key and value after num_tokens (padding of the batch) are not read.
    """
    num_tokens = block_ids.shape[0]
    # [num_blocks, block_tokens, 2, num_kv_heads, head_dim]: both indexed dimensions stand first.
    slots = cache[:, :, layer].permute(0, 3, 2, 1, 4)
    slots[:, :, 0].index_put_((block_ids, offsets), key[:num_tokens])
    slots[:, :, 1].index_put_((block_ids, offsets), value[:num_tokens])
