"""What a launch of either matrix product kernel takes from a weight and its tiles.

Owns the names of the constants that both kernels share. Never launches anything.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.matmul_tiles import Tiles
from kernels.weight import Weight


def descriptors(
    weight: Weight, rows: torch.Tensor, tiles: Tiles
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of the weight and the rows [num_rows, K], in the tiles' blocks."""
    return (
        TensorDescriptor.from_tensor(weight.values, [tiles.block_n, tiles.block_k]),
        TensorDescriptor.from_tensor(rows, [tiles.block_m, tiles.block_k]),
    )


def factors(
    weight: Weight, row_scales: torch.Tensor | None, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row scales, weight scales, bias; out stands for what is absent: a kernel needs a pointer."""
    return (
        out if row_scales is None else row_scales,
        out if weight.scales is None else weight.scales,
        out if weight.bias is None else weight.bias,
    )


def constants(weight: Weight, tiles: Tiles, *, pdl: bool) -> dict[str, Any]:
    """Constants of the kernel and options of the launch."""
    return {
        "NUM_SPLITS": tiles.num_splits,
        "SPLIT_WIDTH": tiles.split_width(weight.values.shape[1]),
        "BLOCK_N": tiles.block_n,
        "BLOCK_M": tiles.block_m,
        "BLOCK_K": tiles.block_k,
        "NUM_STAGES": tiles.num_stages,
        "PER_CHANNEL": weight.scales is not None and not weight.block_scaled,
        "BLOCK_SCALED": weight.block_scaled,
        "HAS_BIAS": weight.bias is not None,
        "PDL": pdl,
        "num_warps": tiles.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    }
