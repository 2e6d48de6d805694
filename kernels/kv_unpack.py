"""FP8 KV blocks as 16-bit ones: what prefill reads of a layer, gathered once for all its tiles.

Owns no memory beyond what it returns. Never writes the pages.
"""

# The bodies of kernels are Triton's, not Python's, to which a type checker holds them.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.kv_pages import KvPages


def kv_unpack(pages: KvPages, layer: int, blocks: torch.Tensor) -> torch.Tensor:
    """FP8 pages, blocks [num_blocks] int32 -> fp16 [num_blocks, num_kv_heads, 1, 2, tokens, dim].

    value = stored * scale, rounded to fp16. Takes num_blocks times a layer's 16-bit bytes.
    """
    if pages.values.is_cuda:
        return _launch_triton(pages, layer, blocks)
    return _twin(pages, layer, blocks)


def _twin(pages: KvPages, layer: int, blocks: torch.Tensor) -> torch.Tensor:
    assert pages.scales is not None
    rows = blocks.long()
    values = pages.values[:, :, layer][rows].float() * pages.scales[:, :, layer][rows][..., None]
    return values.half()[:, :, None]


def _launch_triton(pages: KvPages, layer: int, blocks: torch.Tensor) -> torch.Tensor:
    assert pages.scales is not None
    num_kv_heads, _, two, block_tokens, head_dim = pages.values.shape[1:]
    shape = (blocks.shape[0], num_kv_heads, 1, two, block_tokens, head_dim)
    out = torch.empty(shape, dtype=torch.float16, device=blocks.device)
    values, scales = pages.values[:, :, layer], pages.scales[:, :, layer]
    _unpack_kernel[(blocks.shape[0] * num_kv_heads * two,)](
        values,
        scales,
        blocks,
        out,
        values.stride(0),
        values.stride(1),
        values.stride(2),
        scales.stride(0),
        scales.stride(1),
        scales.stride(2),
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_TOKENS=block_tokens,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    return out


@triton.jit
def _unpack_kernel(
    values_ptr,
    scales_ptr,
    blocks_ptr,
    out_ptr,
    stride_block,
    stride_head,
    stride_value,
    stride_scale_block,
    stride_scale_head,
    stride_scale_value,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    page = tl.program_id(0)
    head = page // 2 % NUM_KV_HEADS
    block = tl.load(blocks_ptr + page // (2 * NUM_KV_HEADS)).to(tl.int64)
    tokens = tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_D)[None, :]
    values_ptr += block * stride_block + head * stride_head + page % 2 * stride_value
    scales_ptr += block * stride_scale_block + head * stride_scale_head
    scales_ptr += page % 2 * stride_scale_value
    places = tokens[:, None] * HEAD_DIM + dims
    values = tl.load(values_ptr + places, mask=dims < HEAD_DIM).to(tl.float32)
    values *= tl.load(scales_ptr + tokens)[:, None]
    out_ptr += page.to(tl.int64) * (BLOCK_TOKENS * HEAD_DIM)
    tl.store(out_ptr + places, values.to(tl.float16), mask=dims < HEAD_DIM)
