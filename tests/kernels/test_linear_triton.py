"""The matrix product kernels against the torch twin, in every weight format, on odd shapes.

Bits are compared on a GPU (tests/gpu/test_gemm.py): the interpreter's product is numpy's.
"""

from __future__ import annotations

import pytest
import torch

from kernels.fp8_quant import FP8, GROUP, Fp8Rows, quantise
from kernels.linear import linear, prepare_weight
from kernels.matmul_decode import launch_decode
from kernels.matmul_prefill import launch_prefill
from kernels.matmul_tiles import Tiles
from kernels.product import Product
from kernels.weight import Weight

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's turn is CPU's")

FORMATS = ("plain", "channel", "block")
NUM_COLS, WIDTH = 200, 400  # no multiple of any block
# Operands are the same numbers on both sides; what differs is the order of an fp32 sum.
TOLERANCE = 1e-6


def _operands(form: str, num_rows: int) -> tuple[torch.Tensor | Fp8Rows, Weight]:
    values, x = torch.randn(NUM_COLS, WIDTH), torch.randn(num_rows, WIDTH)
    bias = torch.randn(NUM_COLS)
    if form == "plain":
        return x.half().float(), prepare_weight(values.half().float(), bias=bias)
    if form == "channel":
        rows = quantise(values)
        return quantise(x), prepare_weight(rows.values, rows.scales.view(-1), bias)
    scales = torch.rand(-(-NUM_COLS // GROUP), -(-WIDTH // GROUP)) + 0.5
    return quantise(x, GROUP), prepare_weight(values.to(FP8), scales, bias)


def _tiles(**changes: int) -> Tiles:
    values = {"block_n": 64, "block_m": 16, "block_k": 128, "num_splits": 1}
    return Tiles(**{**values, "num_warps": 4, "num_stages": 2, **changes})


def _launch(x: torch.Tensor | Fp8Rows, weight: Weight, tiles: Tiles, *, few: bool) -> torch.Tensor:
    rows, scales = (x, None) if isinstance(x, torch.Tensor) else (x.values, x.scales)
    if not few:
        return launch_prefill(rows, scales, weight, tiles, torch.float32, pdl=False)
    out = launch_decode(rows, scales, weight, tiles, torch.float32, pdl=False)
    return out.sum(torch.float32) if isinstance(out, Product) else out


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("few", [True, False], ids=["decode", "prefill"])
def test_the_kernel_agrees_with_the_twin(form: str, num_splits: int, few: bool) -> None:
    x, weight = _operands(form, 19)
    out = _launch(x, weight, _tiles(num_splits=num_splits), few=few)
    reference = linear(x, weight, dtype=torch.float32)
    assert isinstance(reference, torch.Tensor)
    assert (out - reference).norm() / reference.norm() < TOLERANCE


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("few", [True, False], ids=["decode", "prefill"])
def test_the_way_out_changes_nothing(form: str, few: bool) -> None:
    x, weight = _operands(form, 19)
    rows, scales = (x, None) if isinstance(x, torch.Tensor) else (x.values, x.scales)
    launch = launch_decode if few else launch_prefill

    def result(**changes: int) -> torch.Tensor:
        tiles = _tiles(block_m=32, **changes)
        out = launch(rows, scales, weight, tiles, torch.float16, pdl=False)
        assert isinstance(out, torch.Tensor)
        return out

    straight = result()
    for num_pieces in (1, 2):
        assert torch.equal(result(num_pieces=num_pieces), straight)
    if few and form != "block":
        for extra_n in (32, 64):
            out = result(extra_n=extra_n)
            assert (out - straight).norm() / straight.norm() < 1e-3  # fp16 of another numpy product
            assert torch.equal(result(extra_n=extra_n, num_pieces=1), out)


def test_a_weight_names_what_does_not_fit() -> None:
    values = torch.randn(NUM_COLS, WIDTH)
    with pytest.raises(ValueError, match="scales"):
        prepare_weight(values, torch.ones(NUM_COLS))
    with pytest.raises(ValueError, match=r"\[200\] or \[2, 4\]"):
        prepare_weight(values.to(FP8), torch.ones(7))
    with pytest.raises(ValueError, match="bias"):
        prepare_weight(values, bias=torch.ones(7))


def test_rows_of_another_format_are_refused() -> None:
    x, weight = _operands("block", 3)
    assert isinstance(x, Fp8Rows)
    with pytest.raises(ValueError, match="takes 4"):
        linear(quantise(torch.randn(3, WIDTH)), weight)
    with pytest.raises(ValueError, match="takes none"):
        linear(x, prepare_weight(torch.randn(NUM_COLS, WIDTH)))
    with pytest.raises(ValueError, match="float8"):
        linear(torch.randn(3, WIDTH), weight)
