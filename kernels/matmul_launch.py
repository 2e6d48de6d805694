"""What a launch of either matrix product kernel takes from a weight and its tiles.

Owns the names of the constants that both kernels share. Never launches anything.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.matmul_tiles import Tiles
from kernels.weight import Weight

_COPY_BYTES = 16
"""What the copy engine's rows must be multiples of."""


def descriptors(
    weight: Weight, rows: torch.Tensor, tiles: Tiles
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of the weight and the rows [num_rows, K], in the tiles' blocks."""
    return (
        TensorDescriptor.from_tensor(weight.values, [tiles.block_n, tiles.block_k]),
        TensorDescriptor.from_tensor(rows, [tiles.block_m, tiles.block_k]),
    )


def num_pieces(out: torch.Tensor, tiles: Tiles) -> int:
    """Of a finished block on its way out: the tiles', where the copy engine can store to out."""
    able = out.element_size() == 2 and out.stride(0) * out.element_size() % _COPY_BYTES == 0
    return tiles.num_pieces if able else 0


def out_descriptor(
    out: torch.Tensor, tiles: Tiles, num_columns: int
) -> TensorDescriptor | torch.Tensor:
    """Of num_columns of a piece; out itself where nothing takes the copy engine."""
    pieces = num_pieces(out, tiles)
    if pieces == 0:
        return out
    return TensorDescriptor.from_tensor(out, [tiles.block_m // pieces, num_columns])


def extra_descriptors(
    weight: Weight, out: torch.Tensor, tiles: Tiles
) -> tuple[TensorDescriptor, TensorDescriptor | torch.Tensor]:
    """Of the weight and the result, for the second accumulator; for the first's shape without."""
    num_extra = tiles.extra_n or tiles.block_n
    return (
        TensorDescriptor.from_tensor(weight.values, [num_extra, tiles.block_k]),
        out_descriptor(out, tiles, num_extra),
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


def constants(weight: Weight, tiles: Tiles, out: torch.Tensor, *, pdl: bool) -> dict[str, Any]:
    """Constants of the kernel and options of the launch."""
    return {
        "NUM_SPLITS": tiles.num_splits,
        "SPLIT_WIDTH": tiles.split_width(weight.values.shape[1]),
        "BLOCK_N": tiles.block_n,
        "BLOCK_M": tiles.block_m,
        "BLOCK_K": tiles.block_k,
        "NUM_STAGES": tiles.num_stages,
        "NUM_PIECES": num_pieces(out, tiles),
        "PER_CHANNEL": weight.scales is not None and not weight.block_scaled,
        "BLOCK_SCALED": weight.block_scaled,
        "HAS_BIAS": weight.bias is not None,
        "PDL": pdl,
        "num_warps": tiles.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    }
