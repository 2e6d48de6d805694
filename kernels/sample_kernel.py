"""The row sampler's kernel: every row's tokens from one launch over [num_rows, vocab_size] logits.

Owns the two halves of the launch. Scan: one program per (row, tiles) leaves per tile the largest
value, the tile's Gumbel-max draw and sums. Finish: the row's last program to arrive merges the
tiles in order, filters if asked, and writes token, log probability, rank and alternatives. What a
row costs depends on its own parameters, and its bits on its own logits: tiles are cut by
vocabulary alone, however many rows there are and however tiles are dealt to programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.sample_draw import draw_row
from kernels.sample_format import Field, Flag, Status
from kernels.sample_search import (
    INT_MIN,
    adjusted,
    exp_of,
    head_cols,
    measure_before,
    noise_of,
    order_of,
    pick_heads,
    raw_of,
    stream_keys,
    unsigned64,
    value_at_id,
    values_of,
)

LOGITS_ROW = tl.constexpr(int(Field.LOGITS_ROW))
FLAGS = tl.constexpr(int(Field.FLAGS))
TEMPERATURE = tl.constexpr(int(Field.TEMPERATURE))
TOP_K = tl.constexpr(int(Field.TOP_K))
TOP_P = tl.constexpr(int(Field.TOP_P))
LEAST = tl.constexpr(int(Field.LEAST))
SEED = tl.constexpr(int(Field.SEED))
POSITION = tl.constexpr(int(Field.POSITION))
TOKEN = tl.constexpr(int(Field.TOKEN))
NUM_TOP = tl.constexpr(int(Field.NUM_TOP))
BARRED = tl.constexpr(int(Field.BARRED))
NUM_BARRED = tl.constexpr(int(Field.NUM_BARRED))
REPETITION = tl.constexpr(int(Field.REPETITION))
PRESENCE = tl.constexpr(int(Field.PRESENCE))
FREQUENCY = tl.constexpr(int(Field.FREQUENCY))
COUNTS = tl.constexpr(int(Field.COUNTS))
BIAS = tl.constexpr(int(Field.BIAS))
NUM_FIELDS = tl.constexpr(int(Field.NUM_FIELDS))
ADJUSTED = tl.constexpr(int(Flag.ADJUSTED))
COUNTED = tl.constexpr(int(Flag.COUNTED))
LOGPROBS = tl.constexpr(int(Flag.LOGPROBS))
GIVEN = tl.constexpr(int(Flag.GIVEN))
BAD = tl.constexpr(int(Status.BAD))
EMPTY = tl.constexpr(int(Status.EMPTY))


@triton.jit
def _float(ptr):
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit
def _row_of(logits_ptr, control_ptr, fields_ptr, flags, row_stride):
    """The row's tuple for kernels.sample_search."""
    adjusts = (flags & ADJUSTED) != 0
    return (
        logits_ptr + tl.load(fields_ptr + LOGITS_ROW).to(tl.int64) * row_stride,
        adjusts,
        unsigned64(tl.load(fields_ptr + BIAS), tl.load(fields_ptr + BIAS + 1)).to(tl.int64),
        unsigned64(tl.load(fields_ptr + COUNTS), tl.load(fields_ptr + COUNTS + 1)).to(tl.int64),
        control_ptr + tl.load(fields_ptr + BARRED),
        tl.load(fields_ptr + NUM_BARRED),
        _float(fields_ptr + REPETITION),
        _float(fields_ptr + PRESENCE),
        _float(fields_ptr + FREQUENCY),
    )


@triton.jit
def _scan_tile(
    row, raw, tile, scale, keys, draws, normalizes, has_heads, sums_ptr, ids_ptr, heads_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PAD: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Leaves a tile's results in the row's scratch."""
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    value = adjusted(row, raw, cols, VOCAB)
    largest = tl.cast(tl.max(value), tl.float32)
    tl.store(sums_ptr + tile, largest)
    origin = tl.where(largest > -float("inf"), largest, 0.0)
    if draws:
        scaled = (value - origin) * scale
        score = scaled - noise_of(cols, keys)
        drawn = tl.min(tl.where(score == tl.max(score), cols, VOCAB))
        tl.store(ids_ptr + TILES_PAD + tile, drawn)
        tl.store(sums_ptr + TILES_PAD + tile, tl.sum(exp_of(scaled)))
    else:
        tl.store(ids_ptr + tile, tl.min(tl.where(value == largest, cols, VOCAB)))
    if normalizes:
        tl.store(sums_ptr + 2 * TILES_PAD + tile, tl.sum(exp_of(value - origin)))
    if has_heads:
        heads = tl.max(tl.reshape(value, [BLOCK // HEAD, HEAD]), axis=1)
        places = tile * (BLOCK // HEAD) + tl.arange(0, BLOCK // HEAD)
        tl.store(heads_ptr + places, heads, mask=places < (VOCAB + HEAD - 1) // HEAD)


@triton.jit
def _scan(
    row, part, scale, keys, draws, normalizes, has_heads, sums_ptr, ids_ptr, heads_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PER_PART: tl.constexpr,
    TILES_PAD: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """A part's tiles one by one, the next one's logits on their way."""
    tile = part * TILES_PER_PART
    raw = raw_of(row, tile * BLOCK + tl.arange(0, BLOCK), VOCAB)
    next_raw = raw
    for i in range(TILES_PER_PART):
        if TILES_PER_PART > 1:
            limit = tl.where(i + 1 < TILES_PER_PART, 0, VOCAB)
            next_raw = raw_of(row, (tile + 1) * BLOCK + tl.arange(0, BLOCK) + limit, VOCAB)
        if tile * BLOCK < VOCAB:
            _scan_tile(
                row, raw, tile, scale, keys, draws, normalizes, has_heads,
                sums_ptr, ids_ptr, heads_ptr, VOCAB, BLOCK, TILES_PAD, HEAD,
            )  # fmt: skip
        if TILES_PER_PART > 1:
            raw = next_raw
            tile += 1


@triton.jit
def _scan_greedily(
    row, part, sums_ptr, ids_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PER_PART: tl.constexpr,
    TILES_PAD: tl.constexpr,
):  # fmt: skip
    """A plain greedy row's part in one sweep: its result stands in the first of its tiles."""
    cols = part * (TILES_PER_PART * BLOCK) + tl.arange(0, TILES_PER_PART * BLOCK)
    value = tl.load(row[0] + cols, mask=cols < VOCAB, other=-float("inf")).to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    largest = tl.max(value)
    lanes = tl.arange(0, TILES_PER_PART)
    tiles = part * TILES_PER_PART + lanes
    token = tl.min(tl.where(value == largest, cols, VOCAB))
    mask = tiles < TILES_PAD
    tl.store(sums_ptr + tiles, tl.where(lanes == 0, largest, -float("inf")), mask=mask)
    tl.store(ids_ptr + tiles, tl.where(lanes == 0, token, VOCAB), mask=mask)


@triton.jit
def _report_logprobs(
    row, fields_ptr, tile_max, peak, token, sums_ptr, heads_ptr, picked_ptr, report_ptr, top_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PAD: tl.constexpr, HEAD: tl.constexpr,
    HEADS_PAD: tl.constexpr, MAX_PICKED: tl.constexpr,
):  # fmt: skip
    """Writes the token's log probability and rank, and the most likely tokens, best first."""
    tiles = tl.arange(0, TILES_PAD)
    real = tiles < (VOCAB + BLOCK - 1) // BLOCK
    sums = tl.load(sums_ptr + 2 * TILES_PAD + tiles, mask=real, other=0.0, cache_modifier=".cg")
    norm = tl.log(tl.sum(sums * tl.where(real, exp_of(tile_max - peak), 0.0)))
    value = value_at_id(row, token, VOCAB, BLOCK)
    whole = tl.full([], 0, tl.int32)
    rank, _ = measure_before(
        row, picked_ptr, whole, tile_max, peak, 1.0, value, token, VOCAB, BLOCK, TILES_PAD, HEAD
    )
    tl.store(report_ptr + 2, ((value - peak) - norm).to(tl.int32, bitcast=True))
    tl.store(report_ptr + 3, rank)
    num_top = tl.load(fields_ptr + NUM_TOP)
    if num_top > 0:
        listed = pick_heads(heads_ptr, picked_ptr, num_top, VOCAB, HEAD, HEADS_PAD)
        best_ids = head_cols(picked_ptr, listed, 0, VOCAB, MAX_PICKED * HEAD, HEAD)
        best = values_of(row, best_ids, VOCAB)
        keys = tl.where(best_ids < VOCAB, order_of(best), INT_MIN)
        for i in range(num_top):
            top_id = tl.min(tl.where(keys == tl.max(keys), best_ids, VOCAB))
            logprob = (tl.max(tl.where(best_ids == top_id, best, -float("inf"))) - peak) - norm
            tl.store(top_ptr + 2 * i, top_id)
            tl.store(top_ptr + 2 * i + 1, logprob.to(tl.int32, bitcast=True))
            keys = tl.where(best_ids == top_id, INT_MIN, keys)


@triton.jit
def sample_rows_kernel(
    logits_ptr, control_ptr, tokens_ptr, report_ptr, top_ptr,
    sums_ptr, ids_ptr, heads_ptr, picked_ptr, counters_ptr, row_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PER_PART: tl.constexpr,
    TILES_PAD: tl.constexpr, HEAD: tl.constexpr, HEADS_PAD: tl.constexpr,
    MAX_PICKED: tl.constexpr, MAX_LISTED: tl.constexpr, MAX_TOP: tl.constexpr,
    HEADER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (parts of a row, rows); buffers as in kernels.sample_format.SampleBuffers."""
    NUM_TILES: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    NUM_HEADS: tl.constexpr = (VOCAB + HEAD - 1) // HEAD
    part, row_id = tl.program_id(0), tl.program_id(1)
    # The control words were uploaded before the step's first kernel; only logits are the
    # predecessor's.
    num_rows = tl.load(control_ptr)
    fields_ptr = control_ptr + HEADER + row_id * NUM_FIELDS
    flags = tl.load(fields_ptr + FLAGS)
    row = _row_of(logits_ptr, control_ptr, fields_ptr, flags, row_stride)
    temperature = _float(fields_ptr + TEMPERATURE)
    seed = unsigned64(tl.load(fields_ptr + SEED), tl.load(fields_ptr + SEED + 1))
    keys = stream_keys(seed, tl.load(fields_ptr + POSITION))
    draws = temperature > 0.0
    normalizes = (flags & LOGPROBS) != 0
    filters = (tl.load(fields_ptr + TOP_K) > 0) | (_float(fields_ptr + TOP_P) < 1.0)
    has_heads = (tl.load(fields_ptr + NUM_TOP) > 0) | (draws & filters)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if row_id < num_rows:
        sums_ptr += row_id * 3 * TILES_PAD
        ids_ptr += row_id * 2 * TILES_PAD
        heads_ptr += row_id * NUM_HEADS
        picked_ptr += row_id * MAX_LISTED
        report_ptr += row_id * 4
        scale = 1.0 / tl.maximum(temperature, 1e-30)
        if draws | ((flags & (ADJUSTED | LOGPROBS)) != 0):
            _scan(
                row, part, scale, keys, draws, normalizes, has_heads, sums_ptr, ids_ptr,
                heads_ptr, VOCAB, BLOCK, TILES_PER_PART, TILES_PAD, HEAD,
            )  # fmt: skip
        else:
            _scan_greedily(row, part, sums_ptr, ids_ptr, VOCAB, BLOCK, TILES_PER_PART, TILES_PAD)
        tl.debug_barrier()  # this program's stores come before its arrival
        arrived = tl.atomic_add(counters_ptr + row_id, 1, sem="acq_rel")
        if arrived == tl.num_programs(0) - 1:
            tl.store(counters_ptr + row_id, 0)
            tiles = tl.arange(0, TILES_PAD)
            real = tiles < NUM_TILES
            tile_max = tl.load(
                sums_ptr + tiles, mask=real, other=-float("inf"), cache_modifier=".cg"
            )
            tile_ids = tl.load(ids_ptr + tiles, mask=real, other=VOCAB, cache_modifier=".cg")
            peak = tl.max(tile_max)
            token = tl.min(tl.where(tile_max == peak, tile_ids, VOCAB))
            status = tl.full([], 0, tl.int32)
            if peak == float("inf"):
                status = tl.full([], BAD, tl.int32)
                token = tl.full([], 0, tl.int32)
            elif peak == -float("inf"):
                status = tl.full([], EMPTY, tl.int32)
                token = tl.load(fields_ptr + TOKEN)
            else:
                if (flags & GIVEN) != 0:
                    token = tl.load(fields_ptr + TOKEN)
                elif draws:
                    token = draw_row(
                        row, tile_max, peak, scale, keys, tl.load(fields_ptr + TOP_K),
                        _float(fields_ptr + TOP_P), _float(fields_ptr + LEAST),
                        sums_ptr, ids_ptr, heads_ptr, picked_ptr,
                        VOCAB, BLOCK, TILES_PAD, HEAD, HEADS_PAD, MAX_PICKED, MAX_LISTED,
                    )  # fmt: skip
                if normalizes:
                    _report_logprobs(
                        row, fields_ptr, tile_max, peak, token, sums_ptr, heads_ptr, picked_ptr,
                        report_ptr, top_ptr + row_id * 2 * MAX_TOP,
                        VOCAB, BLOCK, TILES_PAD, HEAD, HEADS_PAD, MAX_PICKED,
                    )  # fmt: skip
            tl.store(tokens_ptr + row_id, token)
            tl.store(report_ptr, token)
            tl.store(report_ptr + 1, status)
            if ((flags & COUNTED) != 0) & (status != BAD):
                counts = unsigned64(tl.load(fields_ptr + COUNTS), tl.load(fields_ptr + COUNTS + 1))
                counts_ptr = counts.to(tl.int64).to(tl.pointer_type(tl.int32))
                tl.atomic_add(counts_ptr + token, 1, sem="relaxed")
