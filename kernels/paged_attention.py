"""Causal attention over paged KV, split over the context by fixed size with an ordered merge.

torch twin. A split is one block; splits are merged in passes of PASS_SPLITS, in order. A product is
a (sequence, split, KV head) with a fixed number of query rows, on which a row's bits do not depend
(measured as in kernels/linear.py), and a split that a row does not see adds exact zeros.
So a token's bits depend on its query and its context alone: alone or in a batch, prefill, chunked
prefill and decode agree bit for bit (online softmax: Milakov and Gimelshein, 2018; split KV: Dao et
al., Flash-Decoding, 2023). A cache whose axis 3 has length 1 holds latents (MLA, DeepSeek-V2,
2024): they are keys and values at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

PASS_SPLITS = 16
NARROW_ROWS = 4
WIDE_ROWS = 64
# Added to the scores of keys a row does not see; exp() of anything this far below a peak is 0.
_HIDDEN = -1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Some query tokens of every sequence of a group, in one batch of products.

    The tile looks at the first num_splits splits of the pass. `mask` [num_sequences,
    num_splits - mask_from, 1, num_rows or 1, block_tokens] fp32 is added to the scores of those
    from mask_from on; every row sees the earlier ones in full.
    """

    tokens: slice
    num_rows: int
    num_splits: int
    mask_from: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """PASS_SPLITS consecutive splits: their pages as rows of the cache, and who looks at them.

    pages [num_sequences * num_splits * num_kv_heads] int64: row of layer 0 in the cache seen as
    [num_blocks * num_kv_heads * num_layers, parts * block_tokens * head_dim].
    """

    pages: torch.Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sequences with equally many query tokens, which stand at `rows` of the step's batch.

    num_query_heads: per KV head; scratch: fp32 memory for the pages of a pass, see `scratch_size`.
    """

    rows: slice
    num_sequences: int
    num_query_heads: int
    passes: tuple[Pass, ...]
    scratch: torch.Tensor


def exact_rows(num_query_heads: int, head_dim: int, block_tokens: int, device: torch.device) -> int:
    """Query rows per product for prefill: WIDE_ROWS where its bits are the narrow product's.

    num_query_heads: per KV head.
    """
    generator = torch.Generator().manual_seed(0)
    narrow = narrow_rows(num_query_heads)
    if narrow >= WIDE_ROWS or WIDE_ROWS % narrow:
        return narrow
    query = torch.randn(4, WIDE_ROWS, head_dim, generator=generator).to(device)
    pages = torch.randn(4, 2, block_tokens, head_dim, generator=generator).to(device)
    key, value = pages[:, 0].transpose(1, 2), pages[:, 1]
    scores = torch.bmm(query, key)
    parts = query.split(narrow, dim=1)
    same = torch.equal(torch.cat([torch.bmm(p.contiguous(), key) for p in parts], 1), scores)
    parts = scores.split(narrow, dim=1)
    products = torch.cat([torch.bmm(p.contiguous(), value) for p in parts], 1)
    return WIDE_ROWS if same and torch.equal(products, torch.bmm(scores, value)) else narrow


def narrow_rows(num_query_heads: int) -> int:
    """Query rows per product for one token; num_query_heads: per KV head."""
    return -(-num_query_heads // NARROW_ROWS) * NARROW_ROWS


def scratch_size(num_sequences: int, num_splits: int, cache: torch.Tensor) -> int:
    """fp32 values that a group of this shape reads at a time; cache as in `paged_attention`."""
    num_pages = num_sequences * min(num_splits, PASS_SPLITS) * cache.shape[1]
    return num_pages * math.prod(cache.shape[3:])


def make_group(
    rows: slice,
    starts: list[int],
    tables: list[list[int]],
    cache: torch.Tensor,
    *,
    num_query_heads: int,
    wide_rows: int,
    scratch: torch.Tensor,
) -> Group:
    """Prepares a group once per step.

    starts[i]: position of the first of sequence i's (rows.stop - rows.start) / len(starts) tokens;
    tables[i]: its blocks up to its last token; several sequences must have one token each;
    cache: [num_blocks, num_kv_heads, num_layers, 2, block_tokens, head_dim]; num_query_heads: per
    KV head; wide_rows: what `exact_rows` returned; scratch: flat fp32, at least `scratch_size`,
    which every group of a step may share.
    """
    num_tokens = (rows.stop - rows.start) // len(starts)
    block_tokens = cache.shape[4]
    num_rows = wide_rows if num_tokens > 1 else narrow_rows(num_query_heads)
    per_tile = max(1, num_rows // num_query_heads)
    width = max(map(len, tables))
    # [num_sequences, num_splits], rows padded with a block that is the sequence's own
    table = torch.tensor([t + t[:1] * (width - len(t)) for t in tables], device=cache.device)
    passes: list[Pass] = []
    for splits in _ranges(width, PASS_SPLITS):
        tiles = [
            _tile(starts, tokens, splits, num_rows, num_query_heads, cache)
            for tokens in _ranges(num_tokens, per_tile)
            if max(starts) + tokens.stop > splits.start * block_tokens
        ]
        pages = _pages(table[:, splits.start : splits.stop], cache)
        passes.append(Pass(pages=pages, tiles=tuple(tiles)))
    sizes = {"num_sequences": len(starts), "num_query_heads": num_query_heads}
    return Group(rows=rows, passes=tuple(passes), scratch=scratch, **sizes)


def _ranges(stop: int, step: int) -> list[range]:
    return [range(start, min(stop, start + step)) for start in range(0, stop, step)]


def _tile(
    starts: list[int],
    tokens: range,
    splits: range,
    num_rows: int,
    num_query_heads: int,
    cache: torch.Tensor,
) -> Tile:
    block_tokens, device = cache.shape[4], cache.device
    stop = min(splits.stop, -(-(max(starts) + tokens.stop) // block_tokens))
    num_seen = (
        min(starts) + tokens.start + 1
    ) // block_tokens  # splits that every row sees in full
    mask_from = min(max(num_seen, splits.start), stop)
    # [num_sequences, num_rows or 1]: the position of each row's token
    positions = torch.tensor(starts, device=device)[:, None] + torch.tensor(tokens, device=device)
    if len(tokens) > 1:
        positions = positions.repeat_interleave(num_query_heads, dim=1)
        padding = positions[:, -1:].expand(-1, num_rows - positions.shape[1])
        positions = torch.cat((positions, padding), dim=1)
    keys = torch.arange(mask_from * block_tokens, stop * block_tokens, device=device)
    hidden = keys.view(-1, 1, 1, block_tokens) > positions[:, None, None, :, None]
    return Tile(
        tokens=slice(tokens.start, tokens.stop),
        num_rows=num_rows,
        num_splits=stop - splits.start,
        mask_from=mask_from - splits.start,
        mask=torch.zeros(hidden.shape, device=device).masked_fill_(hidden, _HIDDEN),
    )


def _pages(blocks: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Rows of layer 0 for blocks [num_sequences, num_splits]; flat, KV heads innermost."""
    num_kv_heads, num_layers = cache.shape[1:3]
    heads = torch.arange(num_kv_heads, device=cache.device)
    return ((blocks[:, :, None] * num_kv_heads + heads) * num_layers).flatten()


def paged_attention(
    query: torch.Tensor, cache: torch.Tensor, layer: int, groups: list[Group], scale: float
) -> torch.Tensor:
    """query [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads, head_dim], query's dtype.

    cache: [num_blocks, num_kv_heads, num_layers, 2, block_tokens, head_dim], contiguous. Rows that
    no group covers (padding of the batch) come back as zeros.
    """
    num_kv_heads, head_dim = cache.shape[1], cache.shape[-1]
    scaled = (query.float() * scale).view(query.shape[0], num_kv_heads, -1, head_dim)
    out = torch.zeros_like(scaled)
    rows = cache.view(-1, *cache.shape[-3:])
    for group in groups:
        # [num_sequences, num_tokens, num_kv_heads, num_query_heads, head_dim]
        shape = (group.num_sequences, -1, *scaled.shape[1:])
        _attend(scaled[group.rows].view(shape), rows, layer, group, out[group.rows].view(shape))
    return out.view_as(query).to(query.dtype)


def _attend(
    query: torch.Tensor, rows: torch.Tensor, layer: int, group: Group, out: torch.Tensor
) -> None:
    """query, out [num_sequences, num_tokens, num_kv_heads, num_query_heads, head_dim] fp32."""
    merged: dict[int, State] = {}  # by the tile's first token
    for part in group.passes:
        # [num_sequences * num_splits * num_kv_heads, parts, block_tokens, head_dim]
        pages = group.scratch[: part.pages.numel() * rows[0].numel()].view(-1, *rows.shape[1:])
        if rows.dtype == pages.dtype:
            torch.index_select(rows, 0, part.pages + layer, out=pages)
        else:
            pages.copy_(rows.index_select(0, part.pages + layer))
        for tile in part.tiles:
            state = _pass(query[:, tile.tokens], pages, tile)
            before = merged.get(tile.tokens.start)
            merged[tile.tokens.start] = state if before is None else _merge(before, state)
    for tile in group.passes[0].tiles:
        _, total, acc = merged[tile.tokens.start]
        num_tokens, num_query_heads = out[:, tile.tokens].shape[1], out.shape[3]
        acc = (
            acc[:, :, : num_tokens * num_query_heads] / total[:, :, : num_tokens * num_query_heads]
        )
        # [num_sequences, num_kv_heads, num_tokens, num_query_heads, head_dim]
        acc = acc.unflatten(2, (num_tokens, num_query_heads))
        out[:, tile.tokens] = acc.transpose(1, 2)


State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Peak and sum of the weights [num_sequences, num_kv_heads, num_rows, 1] and the weighted values
[num_sequences, num_kv_heads, num_rows, head_dim] over the splits so far."""


def _pass(query: torch.Tensor, pages: torch.Tensor, tile: Tile) -> State:
    """query [num_sequences, num_tokens, num_kv_heads, num_query_heads, head_dim] over one pass."""
    num_sequences, num_tokens, num_kv_heads, num_query_heads, head_dim = query.shape
    shape = (num_sequences, tile.num_splits, num_kv_heads, tile.num_rows)
    num_products = num_sequences * tile.num_splits * num_kv_heads
    key, value = pages[:num_products, 0], pages[:num_products, -1]
    padded = query.new_zeros(*shape, head_dim)
    used = padded[:, :, :, : num_tokens * num_query_heads]
    used.unflatten(3, (num_tokens, num_query_heads)).copy_(query.transpose(1, 2)[:, None])
    scores = torch.bmm(padded.view(num_products, tile.num_rows, head_dim), key.transpose(1, 2))
    if tile.mask_from < tile.num_splits:
        scores.view(*shape, -1)[:, tile.mask_from :].add_(tile.mask)
    peaks = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peaks).exp_()
    peaks = peaks.view(*shape, 1)
    peak = peaks.amax(1)
    decay = torch.exp(peaks - peak[:, None])
    totals = weights.sum(-1).view_as(decay).mul_(decay)
    accs = torch.bmm(weights, value).view(*shape, head_dim).mul_(decay)
    return peak, _ordered_sum(totals), _ordered_sum(accs)


def _ordered_sum(parts: torch.Tensor) -> torch.Tensor:
    """Sum over dimension 1, one after the other: trailing zeros change nothing."""
    first, *others = parts.unbind(1)
    for part in others:
        first.add_(part)
    return first


def _merge(left: State, right: State) -> State:
    peak = torch.maximum(left[0], right[0])
    left_decay, right_decay = torch.exp(left[0] - peak), torch.exp(right[0] - peak)
    total = (left[1] * left_decay).add_(right[1] * right_decay)
    return peak, total, (left[2] * left_decay).add_(right[2] * right_decay)
