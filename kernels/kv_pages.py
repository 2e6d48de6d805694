"""Paged KV memory as the kernels see it: values by strides, scales beside them when quantised.

Owns the place of a value and of its scale inside a block. Never allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
SCALE_NUM_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPages:
    """values [num_blocks, num_kv_heads, num_layers, 2, block_tokens, head_dim], any strides with
    the last one 1; scales [num_blocks, num_kv_heads, num_layers, 2, block_tokens] fp32 for FP8
    values (value = stored * scale), else None. Axis 3 is K, V; of length 1 it is both: a latent.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def of(
        cls, storage: torch.Tensor, shape: tuple[int, int, int, int, int], dtype: torch.dtype
    ) -> KvPages:
        """Views of storage [num_blocks * block_bytes] uint8; shape as BlockLayout.shape.

        FP8: behind the block_tokens * head_dim values of one (head, layer, part) stand its
        block_tokens scales, so that a head's share of a block stays one run of bytes.
        """
        heads, layers, parts, tokens, dim = shape
        if dtype != FP8:
            return cls(values=storage.view(dtype).view(-1, *shape))
        page = tokens * (dim + SCALE_NUM_BYTES)  # bytes of one (head, layer, part)
        pages = storage.view(-1, heads, layers, parts, page)
        values = pages[..., : tokens * dim].unflatten(-1, (tokens, dim)).view(dtype)
        scales = pages[..., tokens * dim :].view(torch.float32)
        return cls(values=values, scales=scales)
