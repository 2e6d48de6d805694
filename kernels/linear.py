"""Matrix product with weights, row by row the same whatever rows stand beside it.

Owns the choice of the path: on CUDA the kernel that the number of rows' tiles are for; elsewhere
the torch twin. A row's bits depend on the row and the weight alone, on either path.

torch twin. Measured (torch 2.13 CPU, MKL and oneDNN, AVX-512): fp32 rows change their bits with the
number of rows (1 to 3 rows differ from all others, with two threads 5, 6, 7, 9, 10 and 11 do, too),
a single bf16 row does for large N and K; rows in a product of a fixed size never do, wherever they
stand in it. So rows go through the product in tiles of fixed sizes, the last one padded. The widest
size defines the result; the others are used where `exact_tiles` found that they give the same bits.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from kernels.fp8_quant import FP8, Fp8Rows
from kernels.matmul_decode import launch_decode
from kernels.matmul_prefill import launch_prefill
from kernels.matmul_tiles import DECODE_ROWS, Tiles, make_plan
from kernels.product import Product
from kernels.tiles import TileTables
from kernels.weight import Weight

TILES = (64, 16, 8, 4)
"""Rows per product of the twin, widest first."""

ROW_TILE = TILES[-1]
"""Callers that pad their rows to a multiple of it save the padding here."""


def prepare_weight(
    values: torch.Tensor,
    scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    seen: dict[tuple[int, ...], tuple[int, ...]] | None = None,
    *,
    tables: TileTables | None = None,
) -> Weight:
    """values, scales, bias as Weight says (ValueError where they do not fit), with tile sizes.

    seen: shape -> exact tiles, filled here, so that a model's equal shapes are tried once.
    tables: for a GPU; without an entry the product's own defaults hold.
    """
    if values.is_cuda:
        plan = make_plan(
            values.shape[0],
            values.shape[1],
            values.dtype,
            block_scaled=scales is not None and scales.dim() == 2,
            tables=tables,
        )
        return Weight(values=values, scales=scales, bias=bias, plan=plan)
    if values.dtype == FP8:
        return Weight(values=values, scales=scales, bias=bias, row_tiles=TILES[:1])
    found = {} if seen is None else seen
    shape = tuple(values.shape)
    if shape not in found:
        found[shape] = exact_tiles(values)
    return Weight(values=values, scales=scales, bias=bias, row_tiles=found[shape])


@overload
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tiles: tuple[int, ...] = TILES[:1],
) -> torch.Tensor: ...
@overload
def linear(
    x: torch.Tensor | Fp8Rows,
    weight: Weight,
    *,
    dtype: torch.dtype | None = None,
    partial: Literal[False] = False,
    pdl: bool = False,
) -> torch.Tensor: ...
@overload
def linear(
    x: torch.Tensor | Fp8Rows,
    weight: Weight,
    *,
    dtype: torch.dtype | None = None,
    partial: bool,
    pdl: bool = False,
) -> torch.Tensor | Product: ...
def linear(
    x: torch.Tensor | Fp8Rows,
    weight: torch.Tensor | Weight,
    bias: torch.Tensor | None = None,
    *,
    tiles: tuple[int, ...] = TILES[:1],
    dtype: torch.dtype | None = None,
    partial: bool = False,
    pdl: bool = False,
) -> torch.Tensor | Product:
    """x [num_rows, K] @ weight [N, K]^T (+ bias [N]) -> [num_rows, N].

    A Weight brings its bias; x must be quantised as its format asks (ValueError). dtype: of the
    result, x's own without it (bf16 for Fp8Rows). partial: the caller takes a Product, too, which
    is what few rows on a GPU give fastest. pdl: start under the previous kernel.
    A bare tensor goes through the twin on any device, with tiles as `exact_tiles` returns them.
    """
    if not isinstance(weight, Weight):
        assert isinstance(x, torch.Tensor)
        return _tiled(x, weight, bias, tiles)
    rows, row_scales = _operands(x, weight)
    if dtype is None:
        dtype = rows.dtype if row_scales is None else torch.bfloat16
    if weight.plan is None:
        return _twin(x, weight, dtype)
    num_rows = rows.shape[0]
    chosen = weight.plan.at(num_rows)
    if chosen.num_splits > 1 and not (partial and num_rows <= DECODE_ROWS):
        chosen = weight.plan.finished(num_rows)
    return launch(rows, row_scales, weight, chosen, dtype, pdl=pdl)


def launch(
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    weight: Weight,
    tiles: Tiles,
    dtype: torch.dtype,
    *,
    pdl: bool,
) -> torch.Tensor | Product:
    """The kernel that tiles are for, on a GPU; rows [num_rows, K], row_scales [num_rows,
    num_groups] as the weight's format asks.
    """
    kernel = launch_prefill if tiles.persistent else launch_decode
    return kernel(rows, row_scales, weight, tiles, dtype, pdl=pdl)


def exact_tiles(weight: torch.Tensor) -> tuple[int, ...]:
    """The TILES whose bits on this machine are those of the widest, for weight [N, K].

    Accumulation order shows in almost every element of a random product, so one comparison tells.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TILES[0], weight.shape[1], generator=generator)
    x = x.to(device=weight.device, dtype=weight.dtype)
    reference = _tiled(x, weight, None, TILES[:1])
    return tuple(t for t in TILES if torch.equal(_tiled(x, weight, None, (t,)), reference))


def _operands(
    x: torch.Tensor | Fp8Rows, weight: Weight
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(values, scales) of x; ValueError if x is not what the weight's format asks for."""
    if isinstance(x, torch.Tensor):
        if x.dtype != weight.values.dtype:
            raise ValueError(f"x of {x.dtype} for a weight of {weight.values.dtype}")
        return x, None
    if weight.scales is None or x.scales.shape[1] != weight.num_groups:
        raise ValueError(
            f"x with {x.scales.shape[1]} scales a row for a weight of {weight.values.dtype} "
            f"that takes {weight.num_groups if weight.scales is not None else 'none'}"
        )
    return x.values, x.scales


def _twin(x: torch.Tensor | Fp8Rows, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return _tiled(x, weight.values, weight.bias, weight.row_tiles).to(dtype)
    out = _tiled(x.dequantise(torch.float32), weight.dequantise(), None, weight.row_tiles)
    return (out if weight.bias is None else out.add_(weight.bias)).to(dtype)


def _tiled(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tiles: tuple[int, ...]
) -> torch.Tensor:
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
