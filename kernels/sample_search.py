"""Device functions of the row sampler: a row's values, its noise, and searches without a sort.

Owns reading a row (with bias, bars and penalties applied) and finding places in its order (value
descending, token id ascending). Never decides what a row asks for: kernels/sample_kernel.py does.

A row travels as one tuple: (logits address, whether it is adjusted, bias address, counts address,
barred ids, number of them, repetition, presence, frequency). A search runs over a universe: the
whole row in tiles, or `listed` heads (runs of HEAD ids) that hold every token that matters. All
searches are exact: a set before a place is complete, and sums over nested sets are monotone,
because every sum has a fixed tree whose leaves outside the set are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

COUNT_MASK = tl.constexpr((1 << 24) - 1)
INT_MIN = tl.constexpr(-(1 << 31))
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def mix32(value):
    """murmur3's 32-bit finaliser on uint32, as kernels.sampling."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def mix64(value):
    """splitmix64's finaliser on uint64, as kernels.sampling."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def unsigned64(low, high):
    """uint64 of two int32 words."""
    return (high.to(tl.uint32).to(tl.uint64) << 32) | low.to(tl.uint32).to(tl.uint64)


@triton.jit
def stream_keys(seed, position):
    """The two uint32 keys of kernels.sampling.stream_key, of a uint64 seed and an int32 place."""
    place = mix64(position.to(tl.uint64) * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D)
    state = mix64(mix64(seed + 0x9E3779B97F4A7C15) ^ place)
    return state.to(tl.uint32), (state >> 32).to(tl.uint32) | 1


@triton.jit
def log2_of(value):
    """log2 to 2^-22 of normal values: the hardware's one instruction (tl.log2 takes 22)."""
    if INTERPRETED:
        return tl.log2(value)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exp_of(value):
    """exp to 2^-22 for values <= 0; what is below the smallest normal value is 0."""
    power = value * 1.4426950408889634
    if INTERPRETED:
        return tl.exp2(power)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def noise_of(token_ids, keys):
    """Minus standard Gumbel noise per token: kernels.sampling.gumbel_noise up to log's rounding."""
    first, second = keys
    bits = mix32((mix32(token_ids.to(tl.uint32)) ^ first) * second) >> 1
    uniform = tl.minimum(
        (bits.to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10, LARGEST_UNIFORM
    )
    # log2_of has an absolute error: small v, the likely winners, take the series of log(1 - v).
    series = tl.fma(uniform, tl.fma(uniform, 0.14285715, 0.16666667), 0.2)
    series = tl.fma(uniform, tl.fma(uniform, series, 0.25), 0.33333334)
    series = tl.fma(uniform, tl.fma(uniform, series, 0.5), 1.0)
    far = log2_of(1.0 - uniform) * -0.6931471805599453
    return log2_of(tl.where(uniform < 0.0625, uniform * series, far)) * 0.6931471805599453


@triton.jit
def raw_of(row, cols, VOCAB: tl.constexpr):
    """Logits at cols as they are stored; -inf beyond the vocabulary."""
    return tl.load(row[0] + cols, mask=cols < VOCAB, other=-float("inf"))


@triton.jit
def adjusted(row, raw, cols, VOCAB: tl.constexpr):
    """fp32 logits after bias, bars and penalties; NaN and +inf come back as +inf."""
    _, adjusts, bias, counts, barred_ptr, num_barred, repetition, presence, frequency = row
    raw = raw.to(tl.float32)
    raw = tl.where(raw == raw, raw, float("inf"))
    value = raw
    if adjusts:
        if bias != 0:
            bias_ptr = bias.to(tl.pointer_type(tl.float32))
            value += tl.load(bias_ptr + cols, mask=cols < VOCAB, other=0.0)
        for i in range(num_barred):
            value = tl.where(cols == tl.load(barred_ptr + i), -float("inf"), value)
        if counts != 0:
            counts_ptr = counts.to(tl.pointer_type(tl.int32))
            word = tl.load(counts_ptr + cols, mask=cols < VOCAB, other=0)
            repeated = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
            value = tl.where(word != 0, repeated, value)
            count = (word & COUNT_MASK).to(tl.float32)
            value = tl.where(count > 0, value - (count * frequency + presence), value)
        value = tl.where(raw == float("inf"), raw, value)
    return value


@triton.jit
def values_of(row, cols, VOCAB: tl.constexpr):
    """`adjusted` of what is stored at cols."""
    return adjusted(row, raw_of(row, cols, VOCAB), cols, VOCAB)


@triton.jit
def order_of(value):
    """int32 keys in the order of fp32 values; -0.0 equals 0.0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_at(key):
    """The fp32 value of a key of order_of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def is_before(value, token_ids, place_value, place_id):
    """Whether tokens stand before (place_value, place_id) in the order."""
    return (value > place_value) | ((value == place_value) & (token_ids < place_id))


@triton.jit
def head_cols(
    picked_ptr, listed, tile, VOCAB: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr
):
    """Ids [BLOCK] of a tile of the universe; >= VOCAB where it has none."""
    lanes = tl.arange(0, BLOCK)
    place = tile * (BLOCK // HEAD) + lanes // HEAD
    picked = tl.load(picked_ptr + place, mask=place < listed, other=VOCAB)
    cols = tl.where(listed > 0, picked, place) * HEAD + lanes % HEAD
    return tl.max_contiguous(tl.multiple_of(cols, HEAD), HEAD)


@triton.jit
def tiles_with(mask, listed, TILES_PAD: tl.constexpr, PER_TILE: tl.constexpr):
    """Bits of the tiles to visit: those marked [TILES_PAD], or all that hold listed heads."""
    bits = tl.full([TILES_PAD], 1, tl.uint64) << tl.arange(0, TILES_PAD).to(tl.uint64)
    whole = tl.sum(tl.where(mask, bits, 0))
    one = tl.full([], 1, tl.uint64)
    return tl.where(listed > 0, (one << tl.cdiv(listed, PER_TILE).to(tl.uint64)) - one, whole)


@triton.jit
def lowest_of(left):
    """Place of the lowest set bit of a uint64; 64 and more when none is."""
    lowest = (left & (~left + 1)).to(tl.float32)
    return tl.where(left == 0, 64, (lowest.to(tl.int32, bitcast=True) >> 23) - 127)


@triton.jit
def measure_before(
    row, picked_ptr, listed, tile_max, peak, scale, place_value, place_id,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PAD: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """(number, mass) of the universe's tokens before a place."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    left = tiles_with(tile_max >= place_value, listed, TILES_PAD, BLOCK // HEAD)
    cols = head_cols(picked_ptr, listed, lowest_of(left), VOCAB, BLOCK, HEAD)
    raw = raw_of(row, cols, VOCAB)
    while left != 0:
        left &= left - 1
        next_cols = head_cols(picked_ptr, listed, lowest_of(left), VOCAB, BLOCK, HEAD)
        next_raw = raw_of(row, next_cols, VOCAB)  # on its way while this tile is worked on
        value = adjusted(row, raw, cols, VOCAB)
        before = is_before(value, cols, place_value, place_id)
        count += before.to(tl.int32)
        mass += tl.where(before, exp_of((value - peak) * scale), 0.0)
        cols, raw = next_cols, next_raw
    return tl.sum(count), tl.sum(mass)


@triton.jit
def draw_before(
    row, picked_ptr, listed, tile_max, peak, scale, keys, least, place_value, place_id,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PAD: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """(value, id) that Gumbel-max draws from the tokens before a place, scaled values >= least."""
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    best_id = tl.full([BLOCK], VOCAB, tl.int32)
    holds = (tile_max >= place_value) & ((tile_max - peak) * scale >= least)
    left = tiles_with(holds, listed, TILES_PAD, BLOCK // HEAD)
    cols = head_cols(picked_ptr, listed, lowest_of(left), VOCAB, BLOCK, HEAD)
    raw = raw_of(row, cols, VOCAB)
    while left != 0:
        left &= left - 1
        next_cols = head_cols(picked_ptr, listed, lowest_of(left), VOCAB, BLOCK, HEAD)
        next_raw = raw_of(row, next_cols, VOCAB)
        value = adjusted(row, raw, cols, VOCAB)
        scaled = (value - peak) * scale
        kept = is_before(value, cols, place_value, place_id) & (scaled >= least)
        score = tl.where(kept, scaled - noise_of(cols, keys), -float("inf"))
        best_id = tl.where(score > best, cols, best_id)
        best = tl.maximum(score, best)
        cols, raw = next_cols, next_raw
    token = tl.min(tl.where(best == tl.max(best), best_id, VOCAB))
    return value_at_id(row, token, VOCAB, BLOCK), token


@triton.jit
def count_reaching(
    row, picked_ptr, listed, tile_max, key,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES_PAD: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """How many tokens of the universe have at least this key."""
    count = tl.zeros([BLOCK], tl.int32)
    left = tiles_with(order_of(tile_max) >= key, listed, TILES_PAD, BLOCK // HEAD)
    cols = head_cols(picked_ptr, listed, lowest_of(left), VOCAB, BLOCK, HEAD)
    raw = raw_of(row, cols, VOCAB)
    while left != 0:
        left &= left - 1
        next_cols = head_cols(picked_ptr, listed, lowest_of(left), VOCAB, BLOCK, HEAD)
        next_raw = raw_of(row, next_cols, VOCAB)
        reaches = order_of(adjusted(row, raw, cols, VOCAB)) >= key
        count += (reaches & (cols < VOCAB)).to(tl.int32)
        cols, raw = next_cols, next_raw
    return tl.sum(count)


@triton.jit
def value_at_id(row, token, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The value of one token."""
    cols = token // BLOCK * BLOCK + tl.arange(0, BLOCK)
    return tl.max(tl.where(cols == token, values_of(row, cols, VOCAB), -float("inf")))


@triton.jit
def nth_key(keys, n):
    """A key that at least n of `keys` reach and fewer than n exceed."""
    low = tl.cast(tl.min(keys), tl.int64)
    high = tl.cast(tl.max(keys), tl.int64) + 1
    count = tl.full([], -1, tl.int32)
    while (high - low > 1) & (count != n):
        middle = (low + high) >> 1
        count = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32))
        low = tl.where(count >= n, middle, low)
        high = tl.where(count >= n, high, middle)
    return low.to(tl.int32)


@triton.jit
def first_of(keys, n):
    """Marks the n largest keys; among equals those that stand first."""
    least = nth_key(keys, n)
    above = keys > least
    equal = (keys == least).to(tl.int32)
    room = n - tl.sum(above.to(tl.int32))
    return above | ((equal != 0) & (tl.cumsum(equal, 0) <= room))


@triton.jit
def pick_heads(
    heads_ptr, picked_ptr, n,
    VOCAB: tl.constexpr, HEAD: tl.constexpr, HEADS_PAD: tl.constexpr,
):  # fmt: skip
    """Lists the n heads (at most all) whose largest tokens come first, in id order; how many.

    The row's first n tokens lie in them.
    """
    NUM_HEADS: tl.constexpr = (VOCAB + HEAD - 1) // HEAD
    lanes = tl.arange(0, HEADS_PAD)
    head = tl.load(heads_ptr + lanes, mask=lanes < NUM_HEADS, other=0.0, cache_modifier=".cg")
    picked = first_of(
        tl.where(lanes < NUM_HEADS, order_of(head), INT_MIN), tl.minimum(n, NUM_HEADS)
    )
    tl.debug_barrier()  # an earlier list's readers are done
    tl.store(picked_ptr + tl.cumsum(picked.to(tl.int32), 0) - 1, lanes, mask=picked)
    tl.debug_barrier()
    return tl.minimum(n, NUM_HEADS)
