"""The kernels of `paged_decode`: programs that walk the work list, and the merge of their splits.

Owns the arithmetic of a split and of the merge. Launched by kernels/paged_decode.py alone.
"""

# The bodies of kernels are Triton's, not Python's, to which a type checker holds them.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.paged_decode_loads import (
    halves,
    load_query,
    load_tile,
)

# What a score that is not there counts as: exp2() of anything this far below a peak is 0.
_HIDDEN = tl.constexpr(-1e30)
# Items whose tiles a program counts at a time.
_LANES = tl.constexpr(64)


@triton.jit(do_not_specialize=["last_item"])
def decode_kernel(
    query_ptr,
    values_ptr,
    scales_ptr,
    out_ptr,
    items_ptr,
    blocks_ptr,
    counts_ptr,
    accs_ptr,
    sums_ptr,
    last_item,
    score_scale,
    stride_query,
    stride_block,
    stride_head,
    stride_value,
    stride_token,
    stride_scale_block,
    stride_scale_head,
    stride_scale_value,
    NUM_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    COLS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ON_GPU: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program i takes the items i, i + num_programs, ... of every part, parts innermost.

    A part is up to COLS query heads of a KV head, which has PARTS of them: a product's columns.
    """
    tokens = tl.arange(0, TILE)
    tiles_per_block: tl.constexpr = BLOCK_TOKENS // TILE
    blocks_per_split: tl.constexpr = SPLIT // BLOCK_TOKENS
    # One loop over the tiles of all items: the next item's KV comes while this one is computed.
    work, index = tl.program_id(0), 0
    item = tl.minimum(work // NUM_PARTS, last_item)
    code, num_tokens = tl.load(items_ptr + item * 2), tl.load(items_ptr + item * 2 + 1)
    block = tl.load(blocks_ptr + item * blocks_per_split)
    num_tiles = _count_tiles(items_ptr, counts_ptr, last_item, NUM_PARTS, TILE)
    peak = tl.full([COLS], _HIDDEN, tl.float32)
    # Over the tokens they are added up once an item.
    totals = tl.zeros([TILE, COLS], tl.float32)
    acc0, acc1 = tl.zeros([HALF_DIM, COLS], tl.float32), tl.zeros([HALF_DIM, COLS], tl.float32)
    # Up to here only the plan was read, which is older than the kernel before this one.
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for _ in range(num_tiles):
        part = work % NUM_PARTS
        kv_head = part // PARTS
        first_head = kv_head * GROUP + part % PARTS * COLS
        num_heads = tl.minimum(GROUP - part % PARTS * COLS, COLS)
        row = tl.where(code < 0, -1 - code, code)
        first = index % tiles_per_block * TILE
        tile_ptr = values_ptr + block.to(tl.int64) * stride_block + kv_head * stride_head
        tile_ptr += first * stride_token
        seen = tokens < num_tokens - index * TILE
        source = query_ptr + row.to(tl.int64) * stride_query + first_head * HEAD_DIM
        query0, query1 = load_query(source, num_heads, COLS, HEAD_DIM, HALF_DIM, HAS_SCALES)
        key0, key1 = load_tile(
            tile_ptr, seen, stride_token, 0, HEAD_DIM, HALF_DIM, HAS_SCALES, ON_GPU
        )
        tile_ptr += stride_value
        value0, value1 = load_tile(
            tile_ptr, seen, stride_token, 1, HEAD_DIM, HALF_DIM, HAS_SCALES, ON_GPU
        )
        scores = tl.dot(key0, query0.to(DOT_DTYPE), input_precision="ieee")
        scores = tl.dot(key1, query1.to(DOT_DTYPE), scores, input_precision="ieee") * score_scale
        if HAS_SCALES:
            scale_ptr = scales_ptr + block.to(tl.int64) * stride_scale_block + first
            scale_ptr += kv_head * stride_scale_head + tokens
            scores *= tl.load(scale_ptr, mask=seen, other=0.0)[:, None]
        scores = tl.where(seen[:, None], scores, float("-inf"))
        begins = index == 0
        old_peak = tl.where(begins, _HIDDEN, peak)
        peak = tl.maximum(old_peak, tl.max(scores, 0))
        weights = tl.exp2(scores - peak[None, :])
        decay = tl.exp2(old_peak - peak)[None, :]
        totals = tl.where(begins, 0.0, totals) * decay + weights
        if HAS_SCALES:
            weights *= tl.load(scale_ptr + stride_scale_value, mask=seen, other=0.0)[:, None]
        weights = weights.to(DOT_DTYPE)
        acc0 = tl.dot(value0, weights, tl.where(begins, 0.0, acc0) * decay, input_precision="ieee")
        acc1 = tl.dot(value1, weights, tl.where(begins, 0.0, acc1) * decay, input_precision="ieee")
        ends = (index + 1) * TILE >= num_tokens
        if ends:
            total = tl.sum(totals, 0)
            kept = tl.arange(0, COLS) < num_heads
            if code >= 0:
                # The row's only split. A row of padding saw nothing: 0 / 1.
                whole = tl.where(total > 0, total, 1.0)[None, :]
                heads = row.to(tl.int64) * NUM_HEADS + first_head + tl.arange(0, COLS)
                _store(out_ptr, heads, kept, acc0 / whole, acc1 / whole, HEAD_DIM, HAS_SCALES)
            else:
                heads = item.to(tl.int64) * NUM_HEADS + first_head + tl.arange(0, COLS)
                _store(accs_ptr, heads, kept, acc0, acc1, HEAD_DIM, HAS_SCALES)
                tl.store(sums_ptr + heads * 2, peak, mask=kept)
                tl.store(sums_ptr + heads * 2 + 1, total, mask=kept)
        work = tl.where(ends, work + tl.num_programs(0), work)
        index = tl.where(ends, 0, index + 1)
        item = tl.minimum(work // NUM_PARTS, last_item)
        code, num_tokens = tl.load(items_ptr + item * 2), tl.load(items_ptr + item * 2 + 1)
        block = tl.load(blocks_ptr + item * blocks_per_split + index // tiles_per_block)


@triton.jit
def _count_tiles(
    items_ptr,
    counts_ptr,
    last_item,
    NUM_PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Tiles of all items of this program; a row of padding has one without tokens."""
    num_programs = tl.num_programs(0)
    lanes = tl.arange(0, _LANES)
    work = tl.program_id(0) + lanes * num_programs
    # Before it is known how many items there are, so that both loads go out together.
    item = tl.minimum(work // NUM_PARTS, last_item)
    num_tokens = tl.load(items_ptr + item * 2 + 1)
    num_work = tl.load(counts_ptr) * NUM_PARTS
    num_own = (num_work - tl.program_id(0) + num_programs - 1) // num_programs
    counts = tl.where(lanes < num_own, tl.maximum((num_tokens + TILE - 1) // TILE, 1), 0)
    for start in range(_LANES, num_own, _LANES):
        item = tl.minimum((work + start * num_programs) // NUM_PARTS, last_item)
        num_tokens = tl.load(items_ptr + item * 2 + 1)
        tiles = tl.maximum((num_tokens + TILE - 1) // TILE, 1)
        counts += tl.where(start + lanes < num_own, tiles, 0)
    return tl.sum(counts)


@triton.jit
def _store(ptr, heads, kept, acc0, acc1, HEAD_DIM: tl.constexpr, IN_PAIRS: tl.constexpr):
    """Both halves [HALF_DIM, COLS] to heads [COLS] where these are kept."""
    dims0, dims1 = halves(acc0.shape[0], IN_PAIRS)
    to = ptr + heads[None, :] * HEAD_DIM
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(to + dims0[:, None], acc0.to(dtype), mask=(dims0 < HEAD_DIM)[:, None] & kept[None, :])
    tl.store(to + dims1[:, None], acc1.to(dtype), mask=(dims1 < HEAD_DIM)[:, None] & kept[None, :])


@triton.jit
def merge_kernel(
    accs_ptr,
    sums_ptr,
    out_ptr,
    merges_ptr,
    counts_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of several splits: in order, SPLITS at a time; splits past the last add exact zeros."""
    dims = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, SPLITS)
    work = tl.program_id(0)
    # Of a row that may not be there: asked for together with the number of those that are.
    merge = merges_ptr + work // NUM_HEADS * 3
    row, first_item, num_splits = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    num_work = tl.load(counts_ptr + 1) * NUM_HEADS
    # Up to here only the plan was read, which is older than the kernel before this one.
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while work < num_work:
        head = work % NUM_HEADS
        work += tl.num_programs(0)
        merge = merges_ptr + tl.minimum(work, num_work - 1) // NUM_HEADS * 3
        next_row, next_item, next_splits = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
        peak = _HIDDEN
        total = 0.0
        acc = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, num_splits, SPLITS):
            seen = start + lanes < num_splits
            heads = (first_item + start + lanes).to(tl.int64) * NUM_HEADS + head
            peaks = tl.load(sums_ptr + heads * 2, mask=seen, other=_HIDDEN)
            totals = tl.load(sums_ptr + heads * 2 + 1, mask=seen, other=0.0)
            places = heads[:, None] * HEAD_DIM + dims[None, :]
            kept = seen[:, None] & (dims < HEAD_DIM)[None, :]
            accs = tl.load(accs_ptr + places, mask=kept, other=0.0)
            new_peak = tl.maximum(peak, tl.max(peaks))
            decays = tl.exp2(peaks - new_peak)
            decay = tl.exp2(peak - new_peak)
            peak = new_peak
            total = total * decay + tl.sum(totals * decays)
            acc = acc * decay + tl.sum(accs * decays[:, None], 0)
        out = out_ptr + (row.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dims
        tl.store(out, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
        row, first_item, num_splits = next_row, next_item, next_splits
