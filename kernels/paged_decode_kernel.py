"""The kernels of `paged_decode`: programs that walk the work list, and the merge of their splits.

Owns the arithmetic of a split and of the merge. Launched by kernels/paged_decode.py alone.
"""

# The bodies of kernels are Triton's, not Python's, to which a type checker holds them.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

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
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program i takes the items i, i + num_programs, ... of every KV head, heads innermost."""
    rows = tl.arange(0, ROWS)
    tokens = tl.arange(0, TILE)
    tiles_per_block: tl.constexpr = BLOCK_TOKENS // TILE
    blocks_per_split: tl.constexpr = SPLIT // BLOCK_TOKENS
    dims = tl.arange(0, 2 * HALF_DIM)[None, :]
    dims0, dims1 = _halves(HALF_DIM, HAS_SCALES)
    in_group = (rows < GROUP)[:, None]
    num_tiles = _count_tiles(items_ptr, counts_ptr, last_item, NUM_KV_HEADS, TILE)
    peak = tl.full([ROWS], _HIDDEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc0 = tl.zeros([ROWS, HALF_DIM], tl.float32)
    acc1 = tl.zeros([ROWS, HALF_DIM], tl.float32)
    # One loop over the tiles of all items: the next item's KV comes while this one is computed.
    work, index = tl.program_id(0), 0
    item = tl.minimum(work // NUM_KV_HEADS, last_item)
    code = tl.load(items_ptr + item * 2)
    num_tokens = tl.load(items_ptr + item * 2 + 1)
    block = tl.load(blocks_ptr + item * blocks_per_split)
    # Up to here only the plan was read, which is older than the kernel before this one.
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for _ in range(0, num_tiles):
        head = work % NUM_KV_HEADS
        row = tl.where(code < 0, -1 - code, code)
        first = index % tiles_per_block * TILE
        tile_ptr = values_ptr + block.to(tl.int64) * stride_block + head * stride_head
        tile_ptr += first * stride_token
        seen = tokens < num_tokens - index * TILE
        source = query_ptr + row.to(tl.int64) * stride_query
        source += (head * GROUP + rows)[:, None] * HEAD_DIM
        if HAS_SCALES:
            query = tl.load(source + dims, mask=in_group & (dims < HEAD_DIM), other=0.0)
            query0, query1 = tl.split(tl.reshape(query, [ROWS, HALF_DIM, 2]))
        else:
            query0 = tl.load(source + dims0, mask=in_group & (dims0 < HEAD_DIM), other=0.0)
            query1 = tl.load(source + dims1, mask=in_group & (dims1 < HEAD_DIM), other=0.0)
        places = tokens[None, :] * stride_token
        key0, key1 = _load(tile_ptr + places, seen[None, :], 0, HEAD_DIM, HALF_DIM, HAS_SCALES)
        places = tokens[:, None] * stride_token
        tile_ptr += stride_value
        value0, value1 = _load(tile_ptr + places, seen[:, None], 1, HEAD_DIM, HALF_DIM, HAS_SCALES)
        query0, query1 = query0.to(DOT_DTYPE), query1.to(DOT_DTYPE)
        scores = tl.dot(query0, key0.to(DOT_DTYPE), input_precision="ieee")
        scores = tl.dot(query1, key1.to(DOT_DTYPE), scores, input_precision="ieee") * score_scale
        if HAS_SCALES:
            scale_ptr = scales_ptr + block.to(tl.int64) * stride_scale_block + first
            scale_ptr += head * stride_scale_head + tokens
            scores *= tl.load(scale_ptr, mask=seen, other=0.0)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        begins = index == 0
        old_peak = tl.where(begins, _HIDDEN, peak)
        peak = tl.maximum(old_peak, tl.max(scores, 1))
        weights = tl.exp2(scores - peak[:, None])
        decay = tl.exp2(old_peak - peak)
        total = tl.where(begins, 0.0, total) * decay + tl.sum(weights, 1)
        if HAS_SCALES:
            weights *= tl.load(scale_ptr + stride_scale_value, mask=seen, other=0.0)[None, :]
        weights = weights.to(DOT_DTYPE)
        acc0 = tl.where(begins, 0.0, acc0) * decay[:, None]
        acc1 = tl.where(begins, 0.0, acc1) * decay[:, None]
        acc0 = tl.dot(weights, value0.to(DOT_DTYPE), acc0, input_precision="ieee")
        acc1 = tl.dot(weights, value1.to(DOT_DTYPE), acc1, input_precision="ieee")
        ends = (index + 1) * TILE >= num_tokens
        if ends:
            starts = (head * GROUP + rows)[:, None] * HEAD_DIM
            kept0, kept1 = in_group & (dims0 < HEAD_DIM), in_group & (dims1 < HEAD_DIM)
            if code >= 0:
                # The row's only split. A row of padding saw nothing: 0 / 1.
                whole = tl.where(total > 0, total, 1.0)[:, None]
                out = out_ptr + row.to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM) + starts
                tl.store(out + dims0, (acc0 / whole).to(out_ptr.dtype.element_ty), mask=kept0)
                tl.store(out + dims1, (acc1 / whole).to(out_ptr.dtype.element_ty), mask=kept1)
            else:
                first_head = item.to(tl.int64) * (NUM_KV_HEADS * GROUP)
                accs = accs_ptr + first_head * HEAD_DIM + starts
                tl.store(accs + dims0, acc0, mask=kept0)
                tl.store(accs + dims1, acc1, mask=kept1)
                sums = sums_ptr + (first_head + head * GROUP + rows) * 2
                tl.store(sums, peak, mask=rows < GROUP)
                tl.store(sums + 1, total, mask=rows < GROUP)
        work = tl.where(ends, work + tl.num_programs(0), work)
        index = tl.where(ends, 0, index + 1)
        item = tl.minimum(work // NUM_KV_HEADS, last_item)
        code = tl.load(items_ptr + item * 2)
        num_tokens = tl.load(items_ptr + item * 2 + 1)
        block = tl.load(blocks_ptr + item * blocks_per_split + index // tiles_per_block)


@triton.jit
def _count_tiles(
    items_ptr,
    counts_ptr,
    last_item,
    NUM_KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Tiles of all items of this program; a row of padding has one without tokens."""
    num_programs = tl.num_programs(0)
    lanes = tl.arange(0, _LANES)
    work = tl.program_id(0) + lanes * num_programs
    # Before it is known how many items there are, so that both loads go out together.
    item = tl.minimum(work // NUM_KV_HEADS, last_item)
    num_tokens = tl.load(items_ptr + item * 2 + 1)
    num_work = tl.load(counts_ptr) * NUM_KV_HEADS
    num_own = (num_work - tl.program_id(0) + num_programs - 1) // num_programs
    counts = tl.where(lanes < num_own, tl.maximum((num_tokens + TILE - 1) // TILE, 1), 0)
    for start in range(_LANES, num_own, _LANES):
        item = tl.minimum((work + start * num_programs) // NUM_KV_HEADS, last_item)
        num_tokens = tl.load(items_ptr + item * 2 + 1)
        tiles = tl.maximum((num_tokens + TILE - 1) // TILE, 1)
        counts += tl.where(start + lanes < num_own, tiles, 0)
    return tl.sum(counts)


@triton.jit
def _halves(HALF_DIM: tl.constexpr, IN_PAIRS: tl.constexpr):
    """The head dimensions [1, HALF_DIM] that the two halves of every tile and sum stand for."""
    lane = tl.arange(0, HALF_DIM)[None, :]
    if IN_PAIRS:
        dims0, dims1 = lane * 2, lane * 2 + 1
    else:
        dims0, dims1 = lane, lane + HALF_DIM
    return dims0, dims1


@triton.jit
def _load(
    token_ptr,
    seen,
    TOKEN_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_DIM: tl.constexpr,
    IN_PAIRS: tl.constexpr,
):
    """Both halves of a tile, tokens along 1 - TOKEN_DIM of [HALF_DIM, TILE] or [TILE, HALF_DIM].

    FP8 comes as 16-bit pairs, which the matrix units' loads can transpose; half 0 is the even
    dimensions, half 1 the odd ones.
    """
    lane = tl.expand_dims(tl.arange(0, HALF_DIM), 1 - TOKEN_DIM)
    if IN_PAIRS:
        loaded = seen & (lane < HEAD_DIM // 2)
        pairs = tl.load(token_ptr + lane, mask=loaded, other=0)
        low = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        high = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        low = tl.load(token_ptr + lane, mask=seen & (lane < HEAD_DIM), other=0.0)
        lane += HALF_DIM
        high = tl.load(token_ptr + lane, mask=seen & (lane < HEAD_DIM), other=0.0)
    return low, high


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
    num_work = tl.load(counts_ptr + 1) * NUM_HEADS
    # Up to here only the plan was read, which is older than the kernel before this one.
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        head = work % NUM_HEADS
        merge = merges_ptr + work // NUM_HEADS * 3
        row = tl.load(merge)
        first_item = tl.load(merge + 1)
        num_splits = tl.load(merge + 2)
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
