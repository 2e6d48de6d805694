"""The Gluon kernel of kernels/paged_prefill_hopper.py, which alone launches it.

Owns the arithmetic and the pipeline of a tile. Never runs in the interpreter.
"""

# The bodies of kernels are Triton's, not Python's, to which a type checker holds them.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

HALF_DIM = gl.constexpr(64)
_BLOCKS = gl.constexpr(2)
_TOKENS = gl.constexpr(128)
_GROUP_ROWS = gl.constexpr(64)


@gluon.jit
def prefill_kernel(
    query_ptr,
    rows_desc,
    out_ptr,
    tiles_ptr,
    table_ptr,
    score_scale,
    stride_query,
    stride_table,
    layer_row,
    NUM_LAYERS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """Program i: tile i // NUM_KV_HEADS of KV head i % NUM_KV_HEADS."""
    dtype: gl.constexpr = rows_desc.dtype
    tile = gl.program_id(0) // NUM_KV_HEADS
    head = gl.program_id(0) % NUM_KV_HEADS
    seq = gl.load(tiles_ptr + tile * 4)
    first_row = gl.load(tiles_ptr + tile * 4 + 1)
    num_rows = gl.load(tiles_ptr + tile * 4 + 2)
    start = gl.load(tiles_ptr + tile * 4 + 3)
    table_ptr += seq.to(gl.int64) * stride_table
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_TOKENS, HALF_DIM], dtype)
    # [stage and half of head_dim, tokens, half of head_dim]
    keys = gl.allocate_shared_memory(dtype, [STAGES * 2, _TOKENS, HALF_DIM], half)
    values = gl.allocate_shared_memory(dtype, [STAGES * 2, _TOKENS, HALF_DIM], half)
    queries = gl.allocate_shared_memory(dtype, [4, _GROUP_ROWS, HALF_DIM], half)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=2)
        mbarrier.init(value_empty.index(stage), count=2)
    fence_async_shared()
    context = start + num_rows
    buffers = (keys, values, queries, key_full, key_empty, value_full, value_empty)
    numbers = (query_ptr, out_ptr, score_scale, stride_query, head, first_row, num_rows, start)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_attend, (buffers, numbers, NUM_KV_HEADS, GROUP, HEAD_DIM, STAGES, first)),
            (_attend, (buffers, numbers, NUM_KV_HEADS, GROUP, HEAD_DIM, STAGES, second)),
            (
                _fetch,
                (
                    rows_desc,
                    keys,
                    values,
                    key_full,
                    key_empty,
                    value_full,
                    value_empty,
                    table_ptr,
                    head * (NUM_LAYERS * 2 * BLOCK_TOKENS) + layer_row,
                    context,
                    NUM_KV_HEADS * NUM_LAYERS * 2 * BLOCK_TOKENS,
                    BLOCK_TOKENS,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _fetch(
    rows_desc,
    keys,
    values,
    key_full,
    key_empty,
    value_full,
    value_empty,
    table_ptr,
    first,
    context,
    rows_per_block,
    BLOCK_TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """K and V of all tokens up to context, two blocks a stage; the last block may come twice."""
    num_bytes: gl.constexpr = _TOKENS * HALF_DIM * 4
    last = (context - 1) // BLOCK_TOKENS
    for index in range(0, last // _BLOCKS + 1):
        stage = index % STAGES
        phase = (index // STAGES) & 1
        row0 = gl.load(table_ptr + index * _BLOCKS) * rows_per_block + first
        row1 = gl.load(table_ptr + gl.minimum(index * _BLOCKS + 1, last)) * rows_per_block + first
        full = key_full.index(stage)
        mbarrier.wait(key_empty.index(stage), phase ^ 1)
        mbarrier.expect(full, num_bytes)
        for half in gl.static_range(2):
            target = keys.index(stage * 2 + half)
            column = half * HALF_DIM
            low, high = target.slice(0, BLOCK_TOKENS), target.slice(BLOCK_TOKENS, BLOCK_TOKENS)
            tma.async_copy_global_to_shared(rows_desc, [row0, column], full, low)
            tma.async_copy_global_to_shared(rows_desc, [row1, column], full, high)
        row0 += BLOCK_TOKENS
        row1 += BLOCK_TOKENS
        full = value_full.index(stage)
        mbarrier.wait(value_empty.index(stage), phase ^ 1)
        mbarrier.expect(full, num_bytes)
        for half in gl.static_range(2):
            target = values.index(stage * 2 + half)
            column = half * HALF_DIM
            low, high = target.slice(0, BLOCK_TOKENS), target.slice(BLOCK_TOKENS, BLOCK_TOKENS)
            tma.async_copy_global_to_shared(rows_desc, [row0, column], full, low)
            tma.async_copy_global_to_shared(rows_desc, [row1, column], full, high)


@gluon.jit
def _scores(queries, keys, zeros, stage, HALF: gl.constexpr):
    """Starts queries x keys; [64 rows, 128 tokens] fp32 once waited for."""
    low = keys.index(stage * 2).permute((1, 0))
    high = keys.index(stage * 2 + 1).permute((1, 0))
    scores = warpgroup_mma(queries.index(HALF * 2), low, zeros, use_acc=False, is_async=True)
    return warpgroup_mma(queries.index(HALF * 2 + 1), high, scores, is_async=True)


@gluon.jit
def _hide(scores, positions, first_token):
    layout: gl.constexpr = scores.type.layout
    tokens = first_token + gl.arange(0, _TOKENS, layout=gl.SliceLayout(0, layout))
    seen = gl.expand_dims(tokens, 0) <= gl.expand_dims(positions, 1)
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _clear(values, stage, num_tokens):
    """Zeros for tokens that nobody wrote: whatever their memory holds, 0 x it must be 0."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tokens = gl.arange(0, _TOKENS, layout=gl.SliceLayout(1, layout))
    for half in gl.static_range(2):
        part = values.index(stage * 2 + half)
        kept = part.load(layout)
        part.store(gl.where(gl.expand_dims(tokens, 1) < num_tokens, kept, gl.zeros_like(kept)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _attend(
    buffers,
    numbers,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
):
    """Rows HALF * 64 to HALF * 64 + 63 of the tile."""
    keys, values, queries, key_full, key_empty, value_full, value_empty = buffers
    query_ptr, out_ptr, score_scale, stride_query, head, first_row, num_rows, start = numbers
    dtype: gl.constexpr = keys.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = HALF * _GROUP_ROWS + gl.arange(0, _GROUP_ROWS, layout=gl.SliceLayout(1, memory))
    dims = gl.arange(0, HALF_DIM, layout=gl.SliceLayout(0, memory))
    kept = gl.expand_dims(rows // GROUP < num_rows, 1)
    places = (head * GROUP + rows % GROUP) * HEAD_DIM
    token_rows = (first_row + rows // GROUP).to(gl.int64)
    sources = gl.expand_dims(token_rows * stride_query + places, 1) + gl.expand_dims(dims, 0)
    for half in gl.static_range(2):
        part = gl.load(query_ptr + sources + half * HALF_DIM, mask=kept, other=0.0)
        queries.index(HALF * 2 + half).store(part.to(dtype))
    fence_async_shared()
    gl.thread_barrier()

    positions = HALF * _GROUP_ROWS + gl.arange(0, _GROUP_ROWS, layout=gl.SliceLayout(1, wide))
    positions = start + positions // GROUP
    context = start + num_rows
    # Pairs of blocks; those before num_full are seen by every row.
    num_pairs = (context + _TOKENS - 1) // _TOKENS
    num_full = (start + 1) // _TOKENS
    zeros = gl.zeros([_GROUP_ROWS, _TOKENS], gl.float32, wide)
    acc0 = gl.zeros([_GROUP_ROWS, HALF_DIM], gl.float32, narrow)
    acc1 = gl.zeros([_GROUP_ROWS, HALF_DIM], gl.float32, narrow)

    mbarrier.wait(key_full.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=[_scores(queries, keys, zeros, 0, HALF)])
    mbarrier.arrive(key_empty.index(0), count=1)
    if num_full == 0:
        scores = _hide(scores, positions, 0)
    peak = gl.max(scores, 1) * score_scale
    weights = gl.exp2(scores * score_scale - gl.expand_dims(peak, 1))
    total = gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(dtype), weights_layout)

    for index in range(1, num_pairs):
        stage = index % STAGES
        before = (index - 1) % STAGES
        mbarrier.wait(key_full.index(stage), (index // STAGES) & 1)
        pending = _scores(queries, keys, zeros, stage, HALF)
        mbarrier.wait(value_full.index(before), ((index - 1) // STAGES) & 1)
        acc0 = warpgroup_mma(weights, values.index(before * 2), acc0, is_async=True)
        acc1 = warpgroup_mma(weights, values.index(before * 2 + 1), acc1, is_async=True)
        scores = warpgroup_mma_wait(2, deps=[pending])
        mbarrier.arrive(key_empty.index(stage), count=1)
        if index >= num_full:
            scores = _hide(scores, positions, index * _TOKENS)
        new_peak = gl.maximum(peak, gl.max(scores, 1) * score_scale)
        following = gl.exp2(scores * score_scale - gl.expand_dims(new_peak, 1))
        decay = gl.exp2(peak - new_peak)
        total = total * decay + gl.sum(following, 1)
        peak = new_peak
        acc0, acc1, weights = warpgroup_mma_wait(0, deps=[acc0, acc1, weights])
        mbarrier.arrive(value_empty.index(before), count=1)
        weights = gl.convert_layout(following.to(dtype), weights_layout)
        factor = gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, narrow)), 1)
        acc0 = acc0 * factor
        acc1 = acc1 * factor

    last = num_pairs - 1
    stage = last % STAGES
    mbarrier.wait(value_full.index(stage), (last // STAGES) & 1)
    if context % _TOKENS != 0:
        _clear(values, stage, context - last * _TOKENS)
    acc0 = warpgroup_mma(weights, values.index(stage * 2), acc0, is_async=True)
    acc1 = warpgroup_mma(weights, values.index(stage * 2 + 1), acc1, is_async=True)
    acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
    factor = gl.expand_dims(gl.convert_layout(1.0 / total, gl.SliceLayout(1, narrow)), 1)
    targets = gl.expand_dims(token_rows * (NUM_KV_HEADS * GROUP * HEAD_DIM) + places, 1)
    targets += gl.expand_dims(dims, 0)
    out_dtype: gl.constexpr = out_ptr.dtype.element_ty
    result = gl.convert_layout((acc0 * factor).to(out_dtype), memory)
    gl.store(out_ptr + targets, result, mask=kept)
    result = gl.convert_layout((acc1 * factor).to(out_dtype), memory)
    gl.store(out_ptr + targets + HALF_DIM, result, mask=kept)
