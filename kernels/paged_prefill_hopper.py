"""Prefill attention over paged KV on Hopper: one warp fetches, two warp groups compute.

The same tiles, order and masks as kernels/paged_prefill.py, for 16-bit KV in blocks of 64 tokens
and heads of 128. A producer warp walks the block table and fetches K and V two blocks at a time
through the tensor memory accelerator; each of two warp groups holds half of the tile's rows and
starts the product of the next blocks before the softmax of the present ones (the schedule of
FlashAttention-3: Shah et al., 2024). Never runs in the interpreter.
"""

# The bodies of kernels are Triton's, not Python's, to which a type checker holds them.
# pyright: reportCallIssue=false

from __future__ import annotations

import math

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention_plan import PREFILL_TILE_ROWS
from kernels.kv_pages import FP8, KvPages
from kernels.paged_prefill_hopper_kernel import HALF_DIM, prefill_kernel

_LOG2_E = math.log2(math.e)
_BLOCK_TOKENS, _HEAD_DIM = 64, 128
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 24, 240


def fits(query: torch.Tensor, pages: KvPages) -> bool:
    """Whether `launch` takes these, or what `kv_unpack` makes of FP8 pages."""
    values = pages.values
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and query.dtype in (torch.bfloat16, torch.float16)
        and (values.dtype == FP8 or (values.dtype == query.dtype and values.is_contiguous()))
        and values.shape[4:] == (_BLOCK_TOKENS, _HEAD_DIM)
        and PREFILL_TILE_ROWS % (query.shape[1] // values.shape[1]) == 0
    )


def launch(
    query: torch.Tensor,
    values: torch.Tensor,
    layer: int,
    tiles: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    *,
    num_stages: int = 2,
) -> torch.Tensor:
    """As `paged_prefill`, over contiguous 16-bit values of KvPages' shape.

    tiles, block_table: as in PrefillPlan. Products are of the values' type.
    """
    num_rows, num_heads, head_dim = query.shape
    _, num_kv_heads, num_layers = values.shape[:3]
    out = torch.empty(num_rows, num_heads * head_dim, dtype=query.dtype, device=query.device)
    prefill_kernel[(tiles.shape[0] * num_kv_heads,)](
        query,
        _descriptor(values),
        out,
        tiles,
        block_table,
        scale * _LOG2_E,
        query.stride(0),
        block_table.stride(0),
        # A multiple of 16 in every layer, so that one compilation serves all.
        layer * 2 * _BLOCK_TOKENS,
        NUM_LAYERS=num_layers,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        HEAD_DIM=head_dim,
        STAGES=num_stages,
        PRODUCER_REGISTERS=_PRODUCER_REGISTERS,
        CONSUMER_REGISTERS=_CONSUMER_REGISTERS,
        num_warps=4,
    )
    return out


def _descriptor(values: torch.Tensor) -> TensorDescriptor:
    """Of half a head dimension of a block's keys, or of its values, which follow them.

    Both are block_tokens rows of values seen as [num_rows, head_dim].
    """
    dtype = gl.bfloat16 if values.dtype == torch.bfloat16 else gl.float16
    box = [_BLOCK_TOKENS, HALF_DIM.value]
    layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
    return TensorDescriptor.from_tensor(values.view(-1, values.shape[-1]), box, layout)
