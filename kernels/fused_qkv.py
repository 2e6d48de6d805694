"""What follows the combined q|k|v projection: q/k norm, rope, and K and V written to their pages.

Owns the one pass that does all of it. Rounding steps are those of the separate operations (norm
rounded, times weight rounded, both products of the rotation and their sum rounded), so that kernel
and twin agree but for the order in which a head's squares are added: 1 ulp after the norm.
"""

# Triton's jit is beyond the type checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.fp8_quant import launch_options, scales_of
from kernels.kv_pages import KvPages
from kernels.kv_write import write_pages
from kernels.product import Product, load_product, product_arguments
from kernels.rmsnorm import pairwise_sum, rmsnorm
from kernels.rope import rope

# Rows up to which latency counts: more heads and more threads a program.
_FEW_ROWS = 256


def qkv_finish(
    qkv: torch.Tensor | Product,
    *,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
    pages: KvPages,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    pdl: bool = False,
) -> torch.Tensor:
    """q [num_rows, num_heads, head_dim] of qkv [num_rows, (num_heads + 2 * num_kv_heads) *
    head_dim], normed and rotated; K and V of every row go to pages at (block, layer, offset).

    q_norm, k_norm: [head_dim], both or none (else a ValueError). cos, signed sin: [context_len,
    head_dim] as ops.rope_tables makes them, in the model's dtype, which a Product is rounded to.
    positions [num_rows]: valid in padding rows, too. block_ids, offsets [num_tokens]: rows with a
    negative block id, and those from num_tokens on, are padding, and nothing of them is stored.
    pages with scales get FP8 and a scale per token and head. pdl: start under the previous kernel.
    """
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm, k_norm: one is None; both or none are needed")
    norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
    launch = _launch_triton if cos.is_cuda else _qkv_finish_torch
    if isinstance(qkv, Product) and not cos.is_cuda:
        qkv = qkv.sum(cos.dtype)
    where = (positions, block_ids, offsets)
    return launch(qkv, norms, eps, (cos, sin), where, pages, layer, num_heads, num_kv_heads, pdl)


def _qkv_finish_torch(
    qkv: torch.Tensor | Product,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    tables: tuple[torch.Tensor, torch.Tensor],
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pages: KvPages,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    pdl: bool,
) -> torch.Tensor:
    assert isinstance(qkv, torch.Tensor)
    positions, block_ids, offsets = where
    rows = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    qk, value = rows[:, :-num_kv_heads], rows[:, -num_kv_heads:]
    if norms is not None:
        q_norm, k_norm = norms
        weight = torch.cat((q_norm.expand(num_heads, -1), k_norm.expand(num_kv_heads, -1)))
        qk = rmsnorm(qk, weight, eps)
        assert isinstance(qk, torch.Tensor)
    cos, sin = (table[positions][:, None] for table in tables)  # [num_rows, 1, head_dim]
    qk = rope(qk, cos, sin)
    write_pages(pages, layer, (qk[:, num_heads:], value), block_ids, offsets)
    return qk[:, :num_heads]


@triton.jit
def _normed(
    low,
    high,
    weight_low,
    weight_high,
    eps,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Both halves [HEADS, HALF] of heads over their root mean square, times the weight."""
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    squares = tl.reshape(wide_low * wide_low + wide_high * wide_high, [HEADS * HALF])
    square = tl.reshape(pairwise_sum(squares, HEADS * HALF, LEVELS), [HEADS, 1])
    scale = tl.rsqrt(square * (1.0 / HEAD_DIM) + eps)
    wide_low = (wide_low * scale).to(low.dtype).to(tl.float32) * weight_low.to(tl.float32)
    wide_high = (wide_high * scale).to(high.dtype).to(tl.float32) * weight_high.to(tl.float32)
    return wide_low.to(low.dtype), wide_high.to(high.dtype)


@triton.jit
def _load_halves(ptrs, mask, HALF_DIM: tl.constexpr):
    low = tl.load(ptrs, mask=mask, other=0.0)
    return low, tl.load(ptrs + HALF_DIM, mask=mask, other=0.0)


@triton.jit
def _rotated(x, other, cos, sin):
    """x * cos + other * signed sin, each product and the sum rounded to x's dtype."""
    first = (x.to(tl.float32) * cos.to(tl.float32)).to(x.dtype)
    second = (other.to(tl.float32) * sin.to(tl.float32)).to(x.dtype)
    return (first.to(tl.float32) + second.to(tl.float32)).to(x.dtype)


@triton.jit
def _store_page(low, high, page_ptrs, scale_ptrs, mask, HALF_DIM: tl.constexpr, FP8: tl.constexpr):
    """Halves [HEADS, HALF] to the heads' slots: page_ptrs [HEADS, HALF], scale_ptrs [HEADS]."""
    if FP8:
        low, high = low.to(tl.float32), high.to(tl.float32)
        factors, scales = scales_of(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1))
        low = (low * factors[:, None]).to(tl.float8e4nv)
        high = (high * factors[:, None]).to(tl.float8e4nv)
        tl.store(scale_ptrs, scales)
    tl.store(page_ptrs, low, mask=mask)
    tl.store(page_ptrs + HALF_DIM, high, mask=mask)


@triton.jit(do_not_specialize=["layer", "num_tokens"])
def _qkv_kernel(
    x_ptr,
    stride_split,
    stride_row,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    block_ids_ptr,
    offsets_ptr,
    q_ptr,
    values_ptr,
    scales_ptr,
    layer,
    num_tokens,
    stride_block,
    stride_head,
    stride_layer,
    stride_kv,
    stride_token,
    scale_block,
    scale_head,
    scale_layer,
    scale_kv,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FP8: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COL_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS
    head = first_head + tl.arange(0, HEADS)
    half = tl.max_contiguous(tl.arange(0, HALF), 8)
    half_dim: tl.constexpr = HEAD_DIM // 2
    mask = (head[:, None] >= 0) & (half[None, :] < half_dim)
    cols = head[:, None] * HEAD_DIM + half[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(positions_ptr + row).to(tl.int64)
    block = tl.load(block_ids_ptr + row, mask=row < num_tokens, other=-1).to(tl.int64)
    offset = tl.load(offsets_ptr + row, mask=row < num_tokens, other=0).to(tl.int64)
    dtype: tl.constexpr = cos_ptr.dtype.element_ty
    low = load_product(
        x_ptr, row, cols, mask, stride_split, stride_row, row_scale_ptr, col_scale_ptr, bias_ptr,
        SPLITS, HAS_ROW_SCALE, HAS_COL_SCALE, HAS_BIAS, dtype,
    )  # fmt: skip
    high = load_product(
        x_ptr, row, cols + half_dim, mask, stride_split, stride_row, row_scale_ptr, col_scale_ptr,
        bias_ptr, SPLITS, HAS_ROW_SCALE, HAS_COL_SCALE, HAS_BIAS, dtype,
    )  # fmt: skip
    if first_head < NUM_HEADS + NUM_KV_HEADS:
        # The same for every head, yet read by each: in registers where they are used.
        every = head[:, None] * 0 + half[None, :]
        cos_low, cos_high = _load_halves(cos_ptr + position * HEAD_DIM + every, mask, half_dim)
        sin_low, sin_high = _load_halves(sin_ptr + position * HEAD_DIM + every, mask, half_dim)
        if HAS_NORM:
            norm_ptr = q_norm_ptr
            if first_head >= NUM_HEADS:
                norm_ptr = k_norm_ptr
            weight_low, weight_high = _load_halves(norm_ptr + every, mask, half_dim)
            low, high = _normed(
                low, high, weight_low, weight_high, eps, HEAD_DIM, HEADS, HALF, LEVELS
            )
        rotated = _rotated(low, high, cos_low, sin_low)
        high = _rotated(high, low, cos_high, sin_high)
        low = rotated
    if first_head < NUM_HEADS:
        q = q_ptr + row * (NUM_HEADS * HEAD_DIM) + cols
        tl.store(q, low, mask=mask)
        tl.store(q + half_dim, high, mask=mask)
    else:
        if block >= 0:
            kv = (first_head >= NUM_HEADS + NUM_KV_HEADS).to(tl.int64)
            kv_head = (head - NUM_HEADS) - kv * NUM_KV_HEADS
            page = block * stride_block + layer.to(tl.int64) * stride_layer + kv * stride_kv
            pages = values_ptr + page + offset * stride_token
            page = block * scale_block + layer.to(tl.int64) * scale_layer + kv * scale_kv
            _store_page(
                low, high, pages + kv_head[:, None] * stride_head + half[None, :],
                scales_ptr + page + offset + kv_head * scale_head, mask, half_dim, FP8,
            )  # fmt: skip


def _launch_triton(
    qkv: torch.Tensor | Product,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    tables: tuple[torch.Tensor, torch.Tensor],
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pages: KvPages,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    pdl: bool,
) -> torch.Tensor:
    arguments, flags = product_arguments(qkv)
    num_rows = (qkv.partials if isinstance(qkv, Product) else qkv).shape[-2]
    head_dim = tables[0].shape[1]
    q = tables[0].new_empty((num_rows, num_heads, head_dim))
    tiles = _tiles(num_rows, num_heads, num_kv_heads, head_dim)
    scales = pages.values if pages.scales is None else pages.scales
    if num_rows:
        _qkv_kernel[(num_rows, (num_heads + 2 * num_kv_heads) // tiles["HEADS"])](
            *arguments,
            *(tables if norms is None else norms),
            *tables,
            *where,
            q,
            pages.values,
            scales,
            layer,
            where[1].shape[0],
            *pages.values.stride()[:5],
            *scales.stride()[:4],
            eps,
            HAS_NORM=norms is not None,
            FP8=pages.scales is not None,
            **tiles,
            **flags,
            **launch_options(pdl=pdl),
        )
    return q


def _tiles(num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """Shapes of a program; no bit depends on what the number of rows chooses."""
    common = math.gcd(num_heads, num_kv_heads)
    few = num_rows <= _FEW_ROWS
    # The heads of a program are all q, k or v: a power of two that divides both counts.
    heads = min(8 if few else 4, common & -common)
    half = triton.next_power_of_2(max(head_dim // 2, 8))
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "HEADS": heads,
        "HALF": half,
        "LEVELS": half.bit_length() - 1,
        "num_warps": max(1, heads * half // (128 if few else 256)),
    }
