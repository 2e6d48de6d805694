"""The grouped products of a mixture of experts: gate and up with SiLU, down, weighted sum.

Owns the three kernels. A program takes one tile of tokens that chose the same expert
(kernels.moe_align) and a block of the expert's rows; weights are the M side of the MMA, so that a
tile of 16 tokens wastes no tensor-core rows. Never chooses tiles, never launches anything.

Order of summation: plain weights, the tensor core's own accumulator from the first to the last k;
e4m3 with a scale per channel the same for gate and up (Hopper's fast accumulation, see
kernels.matmul_decode); block scales, and every e4m3 product behind SiLU, in fp32 after each 128 of
K. It follows the weight's format alone, so a token's bits do not depend on its tile.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from kernels.fp8_quant import GROUP, scales_of

_GROUP = tl.constexpr(GROUP)


@triton.jit
def _tile_pairs(pairs_ptr, tile, num_pairs, BLOCK_M: tl.constexpr):
    """(numbers of a tile's pairs, which of them are no padding)."""
    pairs = tl.load(pairs_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    return pairs, pairs < num_pairs


@triton.jit
def _rows(x_ptr, rows, valid, k, width, BLOCK_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of x [., width] from column k on; 0 in padding."""
    cols = k + tl.arange(0, BLOCK_K)
    mask = valid[:, None] & (cols < width)[None, :]
    return tl.load(x_ptr + rows[:, None] * width + cols[None, :], mask=mask, other=0.0)


@triton.jit
def gate_up_kernel(
    weight_desc,
    x_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    pairs_ptr,
    tile_expert_ptr,
    num_padded_ptr,
    out_ptr,
    out_scale_ptr,
    num_pairs,
    top_k,
    hidden,
    inner,
    num_groups,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """out [num_pairs, inner] = SiLU(gate) * up of x [num_tokens, hidden], rounded to DTYPE; as e4m3
    with a scale per 128 values where the weight [num_experts * 2 * inner, hidden] is e4m3.
    """
    num_blocks = tl.cdiv(inner, BLOCK_N)
    tile = tl.program_id(0) // num_blocks
    start = tl.program_id(0) % num_blocks * BLOCK_N
    if tile * BLOCK_M >= tl.load(num_padded_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile)
    pairs, valid = _tile_pairs(pairs_ptr, tile, num_pairs, BLOCK_M)
    tokens = tl.where(valid, pairs // top_k, 0).to(tl.int64)
    gate_row = expert * 2 * inner + start
    gate = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if BLOCK_SCALED:
        # Scales of all rows of an expert and of those before it, then of its gate's block.
        row_blocks = 2 * inner // _GROUP
        scale_ptr = weight_scale_ptr + (expert * row_blocks + start // _GROUP) * num_groups
        up_scale_ptr = scale_ptr + inner // _GROUP * num_groups
    for k in tl.range(0, hidden, BLOCK_K, num_stages=NUM_STAGES):
        gate_weight = weight_desc.load([gate_row, k])
        up_weight = weight_desc.load([gate_row + inner, k])
        x = _rows(x_ptr, tokens, valid, k, hidden, BLOCK_K)
        if BLOCK_SCALED:
            group = k // _GROUP
            x_scale = tl.load(x_scale_ptr + tokens * num_groups + group, mask=valid, other=0.0)
            scale = tl.broadcast_to((x_scale * tl.load(scale_ptr + group))[None, :], gate.shape)
            gate = tl.fma(tl.dot(gate_weight, x.T), scale, gate)
            scale = tl.broadcast_to((x_scale * tl.load(up_scale_ptr + group))[None, :], up.shape)
            up = tl.fma(tl.dot(up_weight, x.T), scale, up)
        else:
            gate = tl.dot(gate_weight, x.T, gate)
            up = tl.dot(up_weight, x.T, up)
    rows = start + tl.arange(0, BLOCK_N)
    inside = rows < inner
    if PER_CHANNEL:
        x_scale = tl.load(x_scale_ptr + tokens, mask=valid, other=0.0)
        scales = weight_scale_ptr + expert * 2 * inner + rows
        gate = gate * x_scale[None, :] * tl.load(scales, mask=inside, other=0.0)[:, None]
        up = up * x_scale[None, :] * tl.load(scales + inner, mask=inside, other=0.0)[:, None]
    gate = gate.to(DTYPE).to(tl.float32)
    fed = (gate / (1.0 + tl.exp(-gate)) * up.to(DTYPE).to(tl.float32)).to(DTYPE)
    mask = inside[:, None] & valid[None, :]
    if PER_CHANNEL or BLOCK_SCALED:
        tl.static_assert(BLOCK_N == _GROUP)
        wide = tl.where(mask, fed.to(tl.float32), 0.0)
        factors, scales = scales_of(tl.max(tl.abs(wide), axis=0))
        groups = tl.cdiv(inner, _GROUP)
        out_scales = out_scale_ptr + pairs.to(tl.int64) * groups + start // _GROUP
        tl.store(out_scales, scales, mask=valid)
        fed = (wide * factors[None, :]).to(tl.float8e4nv)
    out = out_ptr + pairs.to(tl.int64)[None, :] * inner + rows[:, None]
    tl.store(out, fed, mask=mask)


@triton.jit
def down_kernel(
    weight_desc,
    x_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    pairs_ptr,
    tile_expert_ptr,
    num_padded_ptr,
    out_ptr,
    num_pairs,
    hidden,
    inner,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
):
    """out [num_pairs, hidden] of x [num_pairs, inner] as gate_up_kernel left it."""
    num_blocks = tl.cdiv(hidden, BLOCK_N)
    tile = tl.program_id(0) // num_blocks
    start = tl.program_id(0) % num_blocks * BLOCK_N
    if tile * BLOCK_M >= tl.load(num_padded_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile)
    pairs, valid = _tile_pairs(pairs_ptr, tile, num_pairs, BLOCK_M)
    wide_pairs = tl.where(valid, pairs, 0).to(tl.int64)
    num_groups = tl.cdiv(inner, _GROUP)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in tl.range(0, inner, BLOCK_K, num_stages=NUM_STAGES):
        weight = weight_desc.load([expert * hidden + start, k])
        x = _rows(x_ptr, wide_pairs, valid, k, inner, BLOCK_K)
        if PER_CHANNEL or BLOCK_SCALED:
            group = k // _GROUP
            scale = tl.load(x_scale_ptr + wide_pairs * num_groups + group, mask=valid, other=0.0)
            if BLOCK_SCALED:
                block = expert * (hidden // _GROUP) + start // _GROUP
                scale = scale * tl.load(weight_scale_ptr + block * num_groups + group)
            acc = tl.fma(tl.dot(weight, x.T), tl.broadcast_to(scale[None, :], acc.shape), acc)
        else:
            acc = tl.dot(weight, x.T, acc)
    rows = start + tl.arange(0, BLOCK_N)
    inside = rows < hidden
    if PER_CHANNEL:
        scales = tl.load(weight_scale_ptr + expert * hidden + rows, mask=inside, other=0.0)
        acc = acc * scales[:, None]
    out = out_ptr + wide_pairs[None, :] * hidden + rows[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & valid[None, :])


@triton.jit
def combine_kernel(x_ptr, weight_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out [num_tokens, hidden]: x [num_tokens, TOP_K, hidden] times weights, added in order."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < hidden
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(TOP_K):
        pair = token * TOP_K + rank
        x = tl.load(x_ptr + pair * hidden + cols, mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + pair)
    tl.store(out_ptr + token * hidden + cols, total.to(out_ptr.dtype.element_ty), mask=mask)
