"""Prefill attention over paged KV: causal, several sequences, each after a prefix in its blocks.

A work item is a tile of `prefill_plan`: the query heads of one KV head for some tokens of one
sequence, packed into the rows of a product. KV is read block by block from position 0, so a row's
products and their order depend on its position alone; a block that a row does not see leaves it
exactly as it was: neither chunk boundaries nor other sequences change a bit (FlashAttention-2: Dao,
2023). Never writes KV.
"""

# The bodies of kernels are Triton's, not Python's, to which a type checker holds them.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels import paged_prefill_hopper as hopper
from kernels.attention_plan import PREFILL_TILE_ROWS, PrefillPlan, prefill_tile_tokens
from kernels.kv_pages import FP8, KvPages
from kernels.kv_unpack import kv_unpack
from kernels.paged_decode import read_pages

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """How the kernel runs."""

    num_warps: int = 8
    num_stages: int = 3


def paged_prefill(
    query: torch.Tensor,
    pages: KvPages,
    layer: int,
    plan: PrefillPlan,
    scale: float,
    *,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """query [num_rows, num_heads, head_dim] -> [num_rows, num_heads * head_dim], query's dtype.

    A row at position p sees the tokens 0 to p of its sequence, its own among them: their KV must be
    in the pages already. scale multiplies the scores. Rows that no tile covers are undefined.
    """
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        raise ValueError("query: a row's heads must be contiguous")
    if not query.is_cuda:
        return _twin(query, pages, layer, plan, scale)
    if config is None and hopper.fits(query, pages):
        if pages.scales is None:
            return hopper.launch(query, pages.values, layer, plan.tiles, plan.block_table, scale)
        assert plan.blocks is not None and plan.packed_table is not None, "FP8 pages need them"
        values = kv_unpack(pages, layer, plan.blocks)
        return hopper.launch(query, values, 0, plan.tiles, plan.packed_table, scale)
    return _launch_triton(query, pages, layer, plan, scale, config=config)


def _twin(
    query: torch.Tensor, pages: KvPages, layer: int, plan: PrefillPlan, scale: float
) -> torch.Tensor:
    num_kv_heads, block_tokens = pages.values.shape[1], pages.values.shape[4]
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    for seq, row, num_rows, start in plan.tiles.tolist():
        length = start + num_rows
        blocks = plan.block_table[seq, : -(-length // block_tokens)]
        # [num_kv_heads, length, head_dim]
        key, value = read_pages(pages, layer, blocks, length)
        # [num_kv_heads, group, num_rows, head_dim]
        heads = query[row : row + num_rows].float().unflatten(1, (num_kv_heads, -1))
        scores = heads.permute(1, 2, 0, 3) @ key.transpose(1, 2)[:, None] * scale
        positions = torch.arange(start, length, device=query.device)
        hidden = torch.arange(length, device=query.device) > positions[:, None]
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        out[row : row + num_rows] = (weights @ value[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
    return out.flatten(1).to(query.dtype)


def _launch_triton(
    query: torch.Tensor,
    pages: KvPages,
    layer: int,
    plan: PrefillPlan,
    scale: float,
    *,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    config = config or PrefillConfig()
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, block_tokens = pages.values.shape[1], pages.values.shape[4]
    group = num_heads // num_kv_heads
    out = torch.empty(num_rows, num_heads * head_dim, dtype=query.dtype, device=query.device)
    values = pages.values[:, :, layer]
    scales = None if pages.scales is None else pages.scales[:, :, layer]
    _prefill_kernel[(plan.tiles.shape[0] * num_kv_heads,)](
        query,
        values,
        scales,
        out,
        plan.tiles,
        plan.block_table,
        scale * _LOG2_E,
        query.stride(0),
        plan.block_table.stride(0),
        *values.stride()[:3],
        *((0, 0, 0) if scales is None else scales.stride()[:3]),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        ROWS=max(PREFILL_TILE_ROWS, triton.next_power_of_2(group * prefill_tile_tokens(group))),
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_TOKENS=block_tokens,
        HAS_SCALES=scales is not None,
        DOT_DTYPE=_dot_dtype(query.dtype, pages.values.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _dot_dtype(query: torch.dtype, values: torch.dtype) -> tl.dtype:
    """What the products' operands are; FP8 values are exact in fp16."""
    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return names[torch.float16 if values == FP8 else values]


@triton.jit(do_not_specialize=["stride_table"])
def _prefill_kernel(
    query_ptr,
    values_ptr,
    scales_ptr,
    out_ptr,
    tiles_ptr,
    table_ptr,
    score_scale,
    stride_query,
    stride_table,
    stride_block,
    stride_head,
    stride_value,
    stride_scale_block,
    stride_scale_head,
    stride_scale_value,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    tile = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    seq = tl.load(tiles_ptr + tile * 4)
    first_row = tl.load(tiles_ptr + tile * 4 + 1)
    num_rows = tl.load(tiles_ptr + tile * 4 + 2)
    start = tl.load(tiles_ptr + tile * 4 + 3)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    row = rows // GROUP
    positions = start + row
    kept = (row < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    places = (head * GROUP + rows % GROUP)[:, None] * HEAD_DIM + dims[None, :]
    token_rows = (first_row + row).to(tl.int64)[:, None]
    query = tl.load(query_ptr + token_rows * stride_query + places, mask=kept, other=0.0)
    query = query.to(DOT_DTYPE)
    table_ptr += seq.to(tl.int64) * stride_table
    values_ptr += head * stride_head
    if HAS_SCALES:
        scales_ptr += head * stride_scale_head
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    context = start + num_rows
    # Blocks that every row sees in full, then those on the diagonal.
    num_full = (start + 1) // BLOCK_TOKENS
    num_blocks = (context + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    for masked in tl.static_range(2):
        if masked:
            low, high = num_full, num_blocks
        else:
            low, high = 0, num_full
        # One block ahead, so that the pipeline of K and V does not wait for it.
        block = tl.load(table_ptr + tl.minimum(low, num_blocks - 1)).to(tl.int64)
        for index in tl.range(low, high):
            key_ptr = values_ptr + block * stride_block
            scale_ptr = scales_ptr
            if HAS_SCALES:
                scale_ptr += block * stride_scale_block
            block = tl.load(table_ptr + tl.minimum(index + 1, num_blocks - 1)).to(tl.int64)
            acc, total, peak = _attend(
                query,
                key_ptr,
                stride_value,
                scale_ptr,
                stride_scale_value,
                score_scale,
                index * BLOCK_TOKENS,
                context,
                positions,
                acc,
                total,
                peak,
                masked,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_TOKENS,
                HAS_SCALES,
                DOT_DTYPE,
            )
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    out = out_ptr + token_rows * (NUM_KV_HEADS * GROUP * HEAD_DIM) + places
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _attend(
    query,
    key_ptr,
    stride_value,
    scale_ptr,
    stride_scale_value,
    score_scale,
    first_token,
    context,
    positions,
    acc,
    total,
    peak,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """One block; with MASKED, of tokens that some rows do not see, or that nobody wrote yet."""
    tokens = tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_D)
    offsets = tokens[:, None] * HEAD_DIM + dims[None, :]
    written = first_token + tokens < context
    loaded = tl.full([BLOCK_TOKENS, BLOCK_D], 1, tl.int1)
    if MASKED:
        loaded = loaded & written[:, None]
    if HEAD_DIM != BLOCK_D:
        loaded = loaded & (dims < HEAD_DIM)[None, :]
    key = tl.load(key_ptr + offsets, mask=loaded, other=0.0)
    scores = tl.dot(query, key.to(DOT_DTYPE).T, input_precision="ieee")
    if HAS_SCALES:
        scores *= tl.load(scale_ptr + tokens, mask=written, other=0.0)[None, :]
    if MASKED:
        hidden = (first_token + tokens)[None, :] > positions[:, None]
        scores = tl.where(hidden, float("-inf"), scores)
    new_peak = tl.maximum(peak, tl.max(scores, 1) * score_scale)
    weights = tl.exp2(scores * score_scale - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    value = tl.load(key_ptr + stride_value + offsets, mask=loaded, other=0.0)
    if HAS_SCALES:
        value_scale = tl.load(scale_ptr + stride_scale_value + tokens, mask=written, other=0.0)
        weights *= value_scale[None, :]
    acc = tl.dot(weights.to(DOT_DTYPE), value.to(DOT_DTYPE), acc, input_precision="ieee")
    return acc, total, new_peak
