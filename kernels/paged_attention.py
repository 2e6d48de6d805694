"""Causal attention over paged KV, split over the context by fixed size with an ordered merge.

torch twin. A split is one block; splits are merged in passes of PASS_SPLITS, in order. Every product
is a (sequence, split, KV head) with a fixed number of query rows, of which a row's bits are
independent (measured as in kernels/linear.py), and a split that a row does not see adds exact zeros.
So a token's bits depend on its query and its context alone: alone or in a batch, prefill, chunked
prefill and decode agree bit for bit (online softmax: Milakov and Gimelshein, 2018; split KV: Dao et
al., Flash-Decoding, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PASS_SPLITS = 16
NARROW_ROWS = 4
WIDE_ROWS = 64
# Added to the scores of keys a row does not see; exp() of anything this far below a peak is 0.
_HIDDEN = -1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Query tokens [first_token, last_token) of every sequence of a group, in one batch of products.

    `mask` [num_sequences, num_splits - mask_from, 1, num_rows or 1, block_tokens] fp32 is added to the
    scores of the pass's splits from mask_from on; earlier ones are seen in full.
    """

    first_token: int
    last_token: int
    num_rows: int
    num_splits: int
    mask_from: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """PASS_SPLITS consecutive splits: their pages as rows of the cache, and who looks at them.

    pages [num_sequences * num_splits * num_kv_heads] int64: row of layer 0 in the cache seen as
    [num_blocks * num_kv_heads * num_layers, 2 * block_tokens * head_dim].
    """

    pages: torch.Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sequences with equally many query tokens, which stand at `rows` of the step's batch."""

    rows: slice
    num_sequences: int
    passes: tuple[Pass, ...]


def exact_rows(
    num_query_heads: int, head_dim: int, block_tokens: int, device: torch.device
) -> int:
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


def make_group(
    rows: slice,
    starts: list[int],
    tables: list[list[int]],
    cache: torch.Tensor,
    *,
    num_query_heads: int,
    wide_rows: int,
) -> Group:
    """Prepares a group once per step.

    starts[i]: position of the first of sequence i's (rows.stop - rows.start) / len(starts) tokens;
    tables[i]: its blocks up to its last token; several sequences must have one token each;
    cache: [num_blocks, num_kv_heads, num_layers, 2, block_tokens, head_dim]; num_query_heads: per KV
    head; wide_rows: what `exact_rows` returned.
    """
    num_tokens = (rows.stop - rows.start) // len(starts)
    block_tokens, device = cache.shape[4], cache.device
    num_rows = wide_rows if num_tokens > 1 else narrow_rows(num_query_heads)
    per_tile = max(1, num_rows // num_query_heads)
    width = max(map(len, tables))
    padded = [table + table[:1] * (width - len(table)) for table in tables]
    table = torch.tensor(padded, device=device)  # [num_sequences, num_splits]
    positions = torch.tensor(starts, device=device)[:, None]
    passes: list[Pass] = []
    for first_split in range(0, width, PASS_SPLITS):
        last_split = min(width, first_split + PASS_SPLITS)
        tiles: list[Tile] = []
        for first in range(0, num_tokens, per_tile):
            last = min(num_tokens, first + per_tile)
            if max(starts) + last <= first_split * block_tokens:
                continue  # nothing of this pass is in these tokens' past
            seen = min(starts) + first + 1  # tokens that every row sees
            end = min(last_split, -(-(max(starts) + last) // block_tokens))
            mask_from = min(max(seen // block_tokens, first_split), end)
            token_positions = positions + torch.arange(first, last, device=device)
            tiles.append(
                Tile(
                    first_token=first,
                    last_token=last,
                    num_rows=num_rows,
                    num_splits=end - first_split,
                    mask_from=mask_from - first_split,
                    mask=_mask(token_positions, mask_from, end, block_tokens, cache, num_rows),
                )
            )
        blocks = table[:, first_split:last_split]
        passes.append(Pass(pages=_pages(blocks, cache), tiles=tuple(tiles)))
    return Group(rows=rows, num_sequences=len(starts), passes=tuple(passes))
