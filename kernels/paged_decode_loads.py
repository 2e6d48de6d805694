"""How decode attention's kernel reads queries and KV.

Owns the two halves that a tile is computed in and the conversion of FP8. Computes nothing else.
"""

# The bodies of kernels are Triton's, not Python's, to which a type checker holds them.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

_UNPACK = """{
    .reg .b32 both;
    .reg .b16 low, high;
    prmt.b32 both, $1, 0, BYTES;
    mov.b32 {low, high}, both;
    cvt.rn.f16x2.e4m3x2 $0, low;
}"""
_LOW_BYTES = tl.constexpr(_UNPACK.replace("BYTES", "0x4420"))
_HIGH_BYTES = tl.constexpr(_UNPACK.replace("BYTES", "0x4431"))


@triton.jit
def halves(HALF_DIM: tl.constexpr, IN_PAIRS: tl.constexpr):
    """The head dimensions [HALF_DIM] that the two halves of every tile and sum stand for."""
    lane = tl.arange(0, HALF_DIM)
    if IN_PAIRS:
        dims0, dims1 = lane * 2, lane * 2 + 1
    else:
        dims0, dims1 = lane, lane + HALF_DIM
    return dims0, dims1


@triton.jit
def load_query(
    source,
    num_heads,
    COLS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_DIM: tl.constexpr,
    IN_PAIRS: tl.constexpr,
):
    """Both halves [HALF_DIM, COLS] of num_heads query heads."""
    cols = tl.arange(0, COLS)
    if IN_PAIRS:
        dims = tl.arange(0, 2 * HALF_DIM)[None, :]
        kept = (cols < num_heads)[:, None] & (dims < HEAD_DIM)
        query = tl.load(source + cols[:, None] * HEAD_DIM + dims, mask=kept, other=0.0)
        low, high = tl.split(tl.reshape(query, [COLS, HALF_DIM, 2]))
        low, high = tl.trans(low), tl.trans(high)
    else:
        lane = tl.arange(0, HALF_DIM)[:, None]
        in_group = (cols < num_heads)[None, :]
        source += cols[None, :] * HEAD_DIM + lane
        low = tl.load(source, mask=in_group & (lane < HEAD_DIM), other=0.0)
        high = tl.load(source + HALF_DIM, mask=in_group & (lane + HALF_DIM < HEAD_DIM), other=0.0)
    return low, high


@triton.jit
def load_tile(
    tile_ptr,
    seen,
    stride_token,
    TOKEN_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_DIM: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """Both halves of a tile, tokens along TOKEN_DIM of [TILE, HALF_DIM] or [HALF_DIM, TILE].

    FP8 comes as 16-bit pairs, which the matrix units' loads can transpose; half 0 is the even
    dimensions, half 1 the odd ones, both as fp16.
    """
    lane = tl.expand_dims(tl.arange(0, HALF_DIM), TOKEN_DIM)
    token = tl.expand_dims(tl.arange(0, seen.shape[0]), 1 - TOKEN_DIM)
    seen = tl.expand_dims(seen, 1 - TOKEN_DIM)
    source = tile_ptr + token * stride_token + lane
    if IN_PAIRS:
        pairs = tl.load(source, mask=seen & (lane < HEAD_DIM // 2), other=0)
        low, high = unpack(pairs, False, ON_GPU), unpack(pairs, True, ON_GPU)
    else:
        low = tl.load(source, mask=seen & (lane < HEAD_DIM), other=0.0)
        high = tl.load(source + HALF_DIM, mask=seen & (lane + HALF_DIM < HEAD_DIM), other=0.0)
    return low, high


@triton.jit
def unpack(pairs, HIGH: tl.constexpr, ON_GPU: tl.constexpr):
    """The low or high e4m3 of every int16 as fp16, exactly."""
    if not ON_GPU:
        byte = pairs >> 8 if HIGH else pairs & 0xFF
        return byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    # Two pairs share a register: one instruction gathers their bytes, one converts both.
    return tl.inline_asm_elementwise(
        _HIGH_BYTES if HIGH else _LOW_BYTES,
        "=r,r",
        [pairs],
        dtype=tl.float16,
        is_pure=True,
        pack=2,
    )
