"""Causal attention over paged KV, split over the context by fixed size with an ordered merge.

A split is one block. Every (token, KV head) is a product of its own, so its bits depend on its
query and
its context alone: alone or in a batch, prefill, chunked prefill and decode agree bit for bit
(online softmax: Milakov and Gimelshein, 2018; split KV: Dao et al., Flash-Decoding, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tokens that are computed in one batch of products.

    rows: where the tokens stand in the step's batch. block_table: [num_tokens, max_blocks] when
    every
    token is of another sequence, [1, max_blocks] when all are of one. mask[split]: additive
    [num_tokens, 1, 1, block_tokens] fp32, 0 where the token sees the key, -inf elsewhere; None
    where
    all is seen.
    """

    rows: slice
    block_table: torch.Tensor
    masks: list[torch.Tensor | None]


def make_group(rows: slice, positions: torch.Tensor, block_table: torch.Tensor, bt: int) -> Group:
    """Prepares a group once per step; positions [num_tokens] are those of its queries, bt is
    block_tokens.
    """
    num_splits = int(positions.max()) // bt + 1
    last_full = int(positions.min()) - bt + 1
    masks: list[torch.Tensor | None] = []
    for split in range(num_splits):
        if split * bt <= last_full:
            masks.append(None)
            continue
        keys = torch.arange(split * bt, (split + 1) * bt, device=positions.device)
        hidden = keys[None, :] > positions[:, None]
        mask = torch.zeros(hidden.shape, device=positions.device).masked_fill_(hidden, -torch.inf)
        masks.append(mask[:, None, None, :])
    return Group(rows=rows, block_table=block_table, masks=masks)


def paged_attention(
    query: torch.Tensor, cache: torch.Tensor, layer: int, groups: list[Group], scale: float
) -> torch.Tensor:
    """query [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads, head_dim], query's dtype.

    cache: [num_blocks, num_kv_heads, num_layers, 2, block_tokens, head_dim].
    """
    out = torch.empty_like(query)
    num_kv_heads, head_dim = cache.shape[1], cache.shape[-1]
    for group in groups:
        q = query[group.rows]
        q = (q.float() * scale).view(q.shape[0], num_kv_heads, -1, head_dim)
        out[group.rows] = _attend(q, cache, layer, group).to(query.dtype).view_as(out[group.rows])
    return out


def _attend(q: torch.Tensor, cache: torch.Tensor, layer: int, group: Group) -> torch.Tensor:
    """q [num_tokens, num_kv_heads, group_size, head_dim] fp32 -> same shape."""
    peak = total = acc = None
    for split, mask in enumerate(group.masks):
        # [num_tokens or 1, num_kv_heads, 2, block_tokens, head_dim]
        pages = cache[group.block_table[:, split], :, layer].float()
        pages = pages.expand(q.shape[0], *pages.shape[1:])
        # Contiguous on purpose: a transposed view takes another path when there is one token only.
        scores = _products(q, pages[:, :, 0].transpose(-1, -2).contiguous())
        if mask is not None:
            scores = scores + mask
        top = scores.amax(-1, keepdim=True)
        if peak is None or total is None or acc is None:
            peak = top
            weights = torch.exp(scores - peak)
            total = weights.sum(-1, keepdim=True)
            acc = _products(weights, pages[:, :, 1])
            continue
        new_peak = torch.maximum(peak, top)
        decay = torch.exp(peak - new_peak)
        weights = torch.exp(scores - new_peak)
        total = total * decay + weights.sum(-1, keepdim=True)
        acc = acc * decay + _products(weights, pages[:, :, 1])
        peak = new_peak
    assert acc is not None and total is not None
    return acc / total


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [num_tokens, num_kv_heads, n, k] @ right [num_tokens, num_kv_heads, k, m], one by
    one.
    """
    flat = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return flat.view(*left.shape[:-1], right.shape[-1])
