"""Matrix product with weights, row by row the same whatever rows stand beside it.

torch twin. Measured (torch 2.13 CPU, MKL and oneDNN, AVX-512): fp32 rows change their bits with the
number of rows (1 to 3 rows differ from all others, with two threads 5, 6, 7, 9, 10 and 11 do, too),
a single bf16 row does for large N and K; rows in a product of a fixed size never do, wherever they
stand in it. So rows go through the product in tiles of fixed sizes, the last one padded. The widest
size defines the result; the others are used where `exact_tiles` found that they give the same bits.
"""

from __future__ import annotations

import torch

TILES = (64, 16, 8, 4)
"""Rows per product, widest first."""

ROW_TILE = TILES[-1]
"""Callers that pad their rows to a multiple of it save the padding here."""


def exact_tiles(weight: torch.Tensor) -> tuple[int, ...]:
    """The TILES whose bits on this machine are those of the widest, for weight [N, K].

    Accumulation order shows in almost every element of a random product, so one comparison tells.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TILES[0], weight.shape[1], generator=generator)
    x = x.to(device=weight.device, dtype=weight.dtype)
    reference = linear(x, weight)
    return tuple(t for t in TILES if torch.equal(linear(x, weight, tiles=(t,)), reference))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tiles: tuple[int, ...] = TILES[:1],
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
