"""How a row's token is drawn when top-k, top-p or min-p leave some out: no sort, exact sets.

Owns the three ways to a filtered draw. Never scans or reports: kernels/sample_kernel.py does.

Filters keep a prefix of the order (value descending, id ascending), so a draw over all tokens that
falls into the prefix is the draw over the prefix: it is tested, and only when outside drawn again
among the tokens before it (rounds: 1 + ln(1 / kept mass) on average). top-k up to MAX_PICKED is
settled on chip among the few runs of ids that hold the first k; so is top-p when its nucleus is no
larger.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sample_search import (
    INT_MIN,
    count_reaching,
    draw_before,
    exp_of,
    first_of,
    head_cols,
    is_before,
    measure_before,
    noise_of,
    order_of,
    pick_heads,
    value_at,
    value_at_id,
    values_of,
)


@triton.jit
def _draw_among_first(
    row, peak, scale, keys, n, top_p, total, least, heads_ptr, picked_ptr,
    VOCAB: tl.constexpr, HEAD: tl.constexpr, HEADS_PAD: tl.constexpr, MAX_PICKED: tl.constexpr,
):  # fmt: skip
    """A draw among the first n <= MAX_PICKED tokens, on chip; top-p takes rounds among them.

    total is the mass that top_p is a share of: 0 is that of the n tokens. VOCAB when the nucleus
    is larger than n tokens.
    """
    listed = pick_heads(heads_ptr, picked_ptr, n, VOCAB, HEAD, HEADS_PAD)
    cols = head_cols(picked_ptr, listed, 0, VOCAB, MAX_PICKED * HEAD, HEAD)
    value = values_of(row, cols, VOCAB)
    kept = first_of(tl.where(cols < VOCAB, order_of(value), INT_MIN), n)
    scaled = (value - peak) * scale
    weight = tl.where(kept, exp_of(scaled), 0.0)
    covered = tl.sum(weight)
    limit = tl.where(top_p < 1.0, top_p * tl.where(total > 0.0, total, covered), float("inf"))
    score = tl.where(kept & (scaled >= least), scaled - noise_of(cols, keys), -float("inf"))
    token = tl.full([], VOCAB, tl.int32)
    done = ((total > 0.0) & (covered < limit)).to(tl.int32)
    while done == 0:
        token = tl.min(tl.where(score == tl.max(score), cols, VOCAB))
        place = tl.max(tl.where(cols == token, value, -float("inf")))
        before = is_before(value, cols, place, token)
        mass = tl.sum(tl.where(before, weight, 0.0))
        score = tl.where(before, score, -float("inf"))
        done = ((mass == 0.0) | (mass < limit)).to(tl.int32)
    return token


@triton.jit
def _mass_of_first(
    row, picked_ptr, listed, tile_max, peak, scale, top_k,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PAD: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Mass of the first top_k tokens, by bisection of the k-th value over the universe."""
    low = tl.full([], INT_MIN, tl.int64)
    high = order_of(peak).to(tl.int64) + 1
    count = tl.full([], -1, tl.int32)
    while (high - low > 1) & (count != top_k):
        middle = (low + high) >> 1
        count = count_reaching(
            row, picked_ptr, listed, tile_max, middle.to(tl.int32), VOCAB, BLOCK, TILES_PAD, HEAD
        )
        low = tl.where(count >= top_k, middle, low)
        high = tl.where(count >= top_k, high, middle)
    # Before the lowest id at this value stands what is larger; equals fill up to top_k.
    last = value_at(low.to(tl.int32))
    larger, mass = measure_before(
        row, picked_ptr, listed, tile_max, peak, scale, last, -1, VOCAB, BLOCK, TILES_PAD, HEAD
    )
    return tl.where(larger < top_k, mass + (top_k - larger) * exp_of((last - peak) * scale), mass)


@triton.jit
def _draw_in_rounds(
    row, picked_ptr, listed, tile_max, peak, scale, keys, top_k, limit, least, token,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PAD: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Accepts the draw `token` if the filters keep it, else draws before it, and so on.

    Tokens are kept while fewer than top_k tokens and less mass than limit stand before them.
    """
    value = value_at_id(row, token, VOCAB, BLOCK)
    done = tl.full([], 0, tl.int32)
    measures = (top_k < VOCAB) | (limit < float("inf"))
    while done == 0:
        if (value - peak) * scale >= least:
            done = tl.full([], 1, tl.int32)
            if measures:
                count, mass = measure_before(
                    row, picked_ptr, listed, tile_max, peak, scale, value, token,
                    VOCAB, BLOCK, TILES_PAD, HEAD,
                )  # fmt: skip
                done = ((count == 0) | ((count < top_k) & (mass < limit))).to(tl.int32)
        if done == 0:
            value, token = draw_before(
                row, picked_ptr, listed, tile_max, peak, scale, keys, least, value, token,
                VOCAB, BLOCK, TILES_PAD, HEAD,
            )  # fmt: skip
    return token


@triton.jit
def draw_row(
    row, tile_max, peak, scale, keys, top_k, top_p, least,
    sums_ptr, ids_ptr, heads_ptr, picked_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PAD: tl.constexpr, HEAD: tl.constexpr,
    HEADS_PAD: tl.constexpr, MAX_PICKED: tl.constexpr, MAX_LISTED: tl.constexpr,
):  # fmt: skip
    """The row's draw: the best of the tiles' draws, or what the filters make of it."""
    tiles = tl.arange(0, TILES_PAD)
    real = tiles < (VOCAB + BLOCK - 1) // BLOCK
    drawn = tl.load(ids_ptr + TILES_PAD + tiles, mask=real, other=VOCAB, cache_modifier=".cg")
    value = values_of(row, drawn, VOCAB)
    score = tl.where(real, (value - peak) * scale - noise_of(drawn, keys), -float("inf"))
    token = tl.min(tl.where(score == tl.max(score), drawn, VOCAB))
    if (top_k > 0) | (top_p < 1.0) | (least > -float("inf")):
        total = tl.full([], 0.0, tl.float32)
        if (top_k == 0) & (top_p < 1.0):
            sums = tl.load(sums_ptr + TILES_PAD + tiles, mask=real, other=0.0, cache_modifier=".cg")
            total = tl.sum(sums * tl.where(real, exp_of((tile_max - peak) * scale), 0.0))
        n = tl.where(top_k > 0, top_k, MAX_PICKED)
        first = tl.full([], VOCAB, tl.int32)
        # No weight is above 1, so that a limit above MAX_PICKED is out of the first tokens' reach.
        if (n <= MAX_PICKED) & ((top_k > 0) | (top_p < 1.0)) & (top_p * total <= MAX_PICKED):
            first = _draw_among_first(
                row, peak, scale, keys, n, top_p, total, least, heads_ptr, picked_ptr,
                VOCAB, HEAD, HEADS_PAD, MAX_PICKED,
            )  # fmt: skip
        if first < VOCAB:
            token = first
        else:
            listed = tl.full([], 0, tl.int32)
            if (top_k > 0) & (top_k <= MAX_LISTED):
                listed = pick_heads(heads_ptr, picked_ptr, top_k, VOCAB, HEAD, HEADS_PAD)
            if (top_k > 0) & (top_p < 1.0):
                total = _mass_of_first(
                    row, picked_ptr, listed, tile_max, peak, scale, top_k,
                    VOCAB, BLOCK, TILES_PAD, HEAD,
                )  # fmt: skip
            token = _draw_in_rounds(
                row, picked_ptr, listed, tile_max, peak, scale, keys,
                tl.where(top_k > 0, top_k, VOCAB),
                tl.where(top_p < 1.0, top_p * total, float("inf")), least, token,
                VOCAB, BLOCK, TILES_PAD, HEAD,
            )  # fmt: skip
    return token
