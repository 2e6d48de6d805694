"""Decode attention over paged KV: one query token a row, any mix of lengths, all on the device.

A row's KV is cut into splits of SPLIT_TOKENS; a work item is one split of one KV head, whose query
heads, 8 at a time, are the columns of one product. Programs stay and walk the work list of
`decode_plan`, so the grid knows nothing of lengths and a CUDA graph holds for all of them. A second
kernel merges the rows of several splits, always in the order of the splits: a row's bits depend on
that row alone. (Not the last program to finish: the fence that it takes waits for all the KV on its
way.) Split KV: Dao et al., Flash-Decoding, 2023; online softmax: Milakov and Gimelshein, 2018.
Never writes KV.
"""

# The bodies of kernels are Triton's, not Python's, to which a type checker holds them.
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.attention_plan import SPLIT_TOKENS, DecodePlan
from kernels.kv_pages import FP8, KvPages
from kernels.paged_decode_kernel import decode_kernel, merge_kernel

# Tokens of a product, at most. A part of the result: changing it changes bits.
TILE_TOKENS = 64
# Query heads of a product: with more, Triton 3.6 takes wgmma, and FP8 pages gave NaN on an H100.
_COLS = 8
# Depth of the smallest product.
_MIN_DEPTH = 16
# Splits that a step of the merge holds. A part of the result as well.
_MERGE_SPLITS = 16
# Programs of the merge: many small ones, since each waits for memory most of its time.
_MERGE_WARPS, _MERGES_PER_SM = 1, 16
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """How the kernel runs. num_warps orders sums, so it must be one for all numbers of rows."""

    num_warps: int = 4
    num_stages: int = 4
    programs_per_sm: int = 2
    max_registers: int | None = None


# As many programs as a multiprocessor has room for (by shared memory; FP8: by registers). With
# fewer, some would get one more than others, since the kernel before still holds a part of them.
CONFIG = DecodeConfig()
FP8_CONFIG = DecodeConfig(num_stages=3, programs_per_sm=4, max_registers=128)


def paged_decode(
    query: torch.Tensor,
    pages: KvPages,
    layer: int,
    plan: DecodePlan,
    scale: float,
    *,
    pdl: bool = False,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """query [num_rows, num_heads, head_dim] -> [num_rows, num_heads * head_dim], query's dtype.

    Row i sees the first plan.lengths[i] tokens of the blocks plan.block_table[i]; rows of length 0
    come back as zeros. scale (above 0) multiplies the scores. pdl: the launch may overlap the end
    of the kernel before it, which must not be `decode_plan`'s.
    """
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        raise ValueError("query: a row's heads must be contiguous")
    if query.is_cuda:
        return _launch_triton(query, pages, layer, plan, scale, pdl=pdl, config=config)
    return _twin(query, pages, layer, plan, scale)


def _twin(
    query: torch.Tensor, pages: KvPages, layer: int, plan: DecodePlan, scale: float
) -> torch.Tensor:
    num_kv_heads, block_tokens = pages.values.shape[1], pages.values.shape[4]
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    for row, length in enumerate(plan.lengths.tolist()):
        if not length:
            continue
        blocks = plan.block_table[row, : -(-length // block_tokens)]
        key, value = read_pages(pages, layer, blocks, length)
        heads = query[row].float().unflatten(0, (num_kv_heads, -1))
        weights = torch.softmax(heads @ key.transpose(1, 2) * scale, dim=-1)
        out[row] = (weights @ value).flatten(0, 1)
    return out.flatten(1).to(query.dtype)


def read_pages(
    pages: KvPages, layer: int, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [num_kv_heads, length, head_dim] fp32 of the first tokens of blocks."""
    # [num_blocks, num_kv_heads, 2, block_tokens, head_dim]
    kept = pages.values[:, :, layer][blocks.long()].float()
    if pages.scales is not None:
        kept = kept * pages.scales[:, :, layer][blocks.long()][..., None]
    key, value = kept.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :length].unbind(0)
    return key, value


def _launch_triton(
    query: torch.Tensor,
    pages: KvPages,
    layer: int,
    plan: DecodePlan,
    scale: float,
    *,
    pdl: bool = False,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    config = config or (CONFIG if pages.scales is None else FP8_CONFIG)
    num_rows, num_heads, head_dim = query.shape
    out = torch.empty(num_rows, num_heads * head_dim, dtype=query.dtype, device=query.device)
    workspace = plan.workspace
    values, scales = _views(pages, layer)
    decode_kernel[(_num_programs(query.device, config.programs_per_sm),)](
        query,
        values,
        scales,
        out,
        workspace.items,
        workspace.blocks,
        workspace.counts,
        workspace.accs,
        workspace.sums,
        workspace.items.shape[0] - 1,
        scale * _LOG2_E,
        query.stride(0),
        *values.stride()[:4],
        *((0, 0, 0) if scales is None else scales.stride()[:3]),
        **_constants(query, pages),
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
        launch_pdl=pdl,
    )
    _merge(query, plan, out, pdl=pdl)
    return out


def _views(pages: KvPages, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One layer's values and scales, whose strides are all that the kernel needs to know."""
    values = pages.values[:, :, layer]
    if values.dtype == FP8:
        values = values.view(torch.int16)
    return values, None if pages.scales is None else pages.scales[:, :, layer]


def _constants(query: torch.Tensor, pages: KvPages) -> dict[str, Any]:
    """What a compilation of the kernel is for."""
    num_kv_heads, block_tokens = pages.values.shape[1], pages.values.shape[4]
    _, num_heads, head_dim = query.shape
    group = num_heads // num_kv_heads
    parts = triton.cdiv(group, _COLS)
    return {
        "NUM_PARTS": num_kv_heads * parts,
        "PARTS": parts,
        "NUM_HEADS": num_heads,
        "GROUP": group,
        "COLS": _COLS,
        "HEAD_DIM": head_dim,
        "HALF_DIM": max(_MIN_DEPTH, triton.next_power_of_2(head_dim) // 2),
        "BLOCK_TOKENS": block_tokens,
        "SPLIT": SPLIT_TOKENS,
        "TILE": min(TILE_TOKENS, block_tokens),
        "HAS_SCALES": pages.scales is not None,
        "DOT_DTYPE": _dot_dtype(pages.values.dtype),
        "ON_GPU": query.is_cuda,
    }


def _merge(query: torch.Tensor, plan: DecodePlan, out: torch.Tensor, *, pdl: bool) -> None:
    """Nothing to do where no row of the table can have several splits."""
    num_rows, num_heads, head_dim = query.shape
    workspace = plan.workspace
    block_tokens = SPLIT_TOKENS // workspace.blocks.shape[1]
    if plan.block_table.shape[1] * block_tokens <= SPLIT_TOKENS:
        return
    num_programs = min(_num_programs(query.device, _MERGES_PER_SM), num_rows * num_heads)
    merge_kernel[(num_programs,)](
        workspace.accs,
        workspace.sums,
        out,
        workspace.merges,
        workspace.counts,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        SPLITS=_MERGE_SPLITS,
        PDL=pdl,
        num_warps=_MERGE_WARPS,
        launch_pdl=pdl,
    )


def _num_programs(device: torch.device, per_sm: int) -> int:
    if device.type != "cuda":
        return 3
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return num_sms * per_sm


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What the products' operands are; FP8 values are exact in fp16."""
    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return names[torch.float16 if dtype == FP8 else dtype]
