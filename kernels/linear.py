"""Matrix product with weights, row by row the same whatever rows stand beside it.

torch twin. Measured (torch 2.13 CPU, MKL and oneDNN, AVX-512): fp32 rows change their bits with the
number of rows (1 to 3 rows, and with two threads 5, 6, 7, 9, 10 and 11 rows, differ from all others),
bf16 rows do for large N and K; rows in a product of a fixed size never do, wherever they stand in it.
So rows go through the product in tiles of fixed sizes, the last one padded. The smallest size defines
the result; a wider one is used only where `exact_tiles` found it to give the same bits.
"""

from __future__ import annotations

import torch

ROW_TILE = 8
"""The tile that defines the result; callers that pad to a multiple of it save the padding here."""

WIDE_TILES = (64, 16)


def exact_tiles(weight: torch.Tensor) -> tuple[int, ...]:
    """Tile sizes, widest first, whose bits on this machine are ROW_TILE's; weight [N, K].

    Accumulation order shows in almost every element of a random product, so one comparison tells.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(WIDE_TILES[0], weight.shape[1], generator=generator)
    x = x.to(device=weight.device, dtype=weight.dtype)
    reference = linear(x, weight)
    wide = (t for t in WIDE_TILES if torch.equal(linear(x, weight, tiles=(t,)), reference))
    return (*wide, ROW_TILE)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tiles: tuple[int, ...] = (ROW_TILE,),
) -> torch.Tensor:
    """x [num_rows, K] @ weight [N, K]^T (+ bias [N]) -> [num_rows, N], in x's dtype.

    tiles: sizes to cut the rows into, widest first, as `exact_tiles` returns them.
    """
    num_rows = x.shape[0]
    transposed = weight.t()
    if num_rows in tiles:
        out = torch.mm(x, transposed)
    else:
        padded_rows = -(-num_rows // tiles[-1]) * tiles[-1]
        if padded_rows != num_rows:
            x = torch.nn.functional.pad(x, (0, 0, 0, padded_rows - num_rows))
        out = x.new_empty(padded_rows, weight.shape[0])
        start = 0
        for tile in tiles:
            while padded_rows - start >= tile:
                rows = slice(start, start + tile)
                torch.mm(x[rows], transposed, out=out[rows])
                start += tile
        out = out[:num_rows]
    return out if bias is None else out.add_(bias)
