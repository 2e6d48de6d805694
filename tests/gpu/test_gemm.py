"""The matrix products on a GPU at a model's shapes: right, and a row's bits its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton

from kernels.fp8_quant import FP8, GROUP, Fp8Rows, quantise
from kernels.linear import linear, prepare_weight
from kernels.matmul_tiles import DECODE_ROWS, ROW_COUNTS
from kernels.product import Product
from kernels.tiles import TileTables
from kernels.timing import relative_error
from kernels.weight import Weight

pytestmark = pytest.mark.gpu

# Qwen3-8B: q|k|v, attention output, gate|up, down.
SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
FORMATS = ("plain", "channel", "block")
# bf16 results (1.7e-3) of an fp32 sum; the tensor core's own FP8 accumulator keeps about 14 bits
# (seen: 3.1e-3 at K 12288).
TOLERANCES = {"plain": 2.5e-3, "channel": 4e-3, "block": 2.5e-3}
MANY = 2048


def _weight(form: str, shape: tuple[int, int]) -> Weight:
    values = torch.randn(shape, device="cuda")
    if form == "plain":
        return prepare_weight(values.bfloat16())
    if form == "channel":
        rows = quantise(values)
        return prepare_weight(rows.values, rows.scales.view(-1))
    scales = torch.rand(shape[0] // GROUP, shape[1] // GROUP, device="cuda") + 0.5
    return prepare_weight(values.to(FP8), scales)


def _rows(form: str, num_rows: int, width: int) -> torch.Tensor | Fp8Rows:
    x = torch.randn(num_rows, width, device="cuda")
    if form == "plain":
        return x.bfloat16()
    return quantise(x, GROUP if form == "block" else None)


def _first(x: torch.Tensor | Fp8Rows, rows: slice) -> torch.Tensor | Fp8Rows:
    if isinstance(x, torch.Tensor):
        return x[rows].contiguous()
    return Fp8Rows(values=x.values[rows].contiguous(), scales=x.scales[rows].contiguous())


def _finished(x: torch.Tensor | Fp8Rows, weight: Weight, *, partial: bool) -> torch.Tensor:
    out = linear(x, weight, dtype=torch.bfloat16, partial=partial)
    return out.sum(torch.bfloat16) if isinstance(out, Product) else out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_values_are_those_of_the_dequantised_product(form: str, shape: tuple[int, int]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    weight, x = _weight(form, shape), _rows(form, MANY, shape[1])
    wide = x.dequantise(torch.float32) if isinstance(x, Fp8Rows) else x.float()
    reference = wide @ weight.dequantise().t()
    for num_rows in (1, 64, DECODE_ROWS, MANY):
        out = _finished(_first(x, slice(num_rows)), weight, partial=True)
        assert relative_error(out, reference[:num_rows]) < TOLERANCES[form], num_rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(form: str, shape: tuple[int, int]) -> None:
    weight, x = _weight(form, shape), _rows(form, MANY, shape[1])
    whole = _finished(x, weight, partial=True)
    for num_rows in (*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300):
        for partial in (True, False):
            out = _finished(_first(x, slice(num_rows)), weight, partial=partial)
            _assert_same(out, whole[:num_rows], f"{num_rows} rows, partial {partial}")
    for num_rows in (512, 513, 1024, 1025, 2000):
        out = _finished(_first(x, slice(num_rows)), weight, partial=True)
        _assert_same(out, whole[:num_rows], f"{num_rows} rows")
    for place in (17, 1000, MANY - 1):
        alone = _finished(_first(x, slice(place, place + 1)), weight, partial=True)
        _assert_same(alone[0], whole[place], f"row {place} alone")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "channel"])
def test_this_gpus_table_gives_the_bits_of_the_default(form: str, shape: tuple[int, int]) -> None:
    weight, x = _weight(form, shape), _rows(form, MANY, shape[1])
    tables = TileTables.load(
        torch.cuda.get_device_name(),
        triton.__version__,
        capability=torch.cuda.get_device_capability(),
    )
    plan = prepare_weight(weight.values, weight.scales, tables=tables).plan
    assert plan is not None and weight.plan is not None
    if plan.at(1).num_splits != weight.plan.at(1).num_splits:
        pytest.skip("the table's order of summation is another")
    tuned = replace(weight, plan=plan)
    for num_rows in (*ROW_COUNTS[:-1], *(n + 1 for n in ROW_COUNTS[:-1]), MANY):
        rows = _first(x, slice(num_rows))
        expected = _finished(rows, weight, partial=True)
        _assert_same(_finished(rows, tuned, partial=True), expected, f"{num_rows} rows")


def _assert_same(out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bit for bit; says how many values differ, and by how much."""
    if not torch.equal(out, expected):
        num_other = int((out != expected).sum())
        error = relative_error(out, expected)
        pytest.fail(f"{what}: {num_other} of {out.numel()} values differ, relative {error:.1e}")


@pytest.mark.parametrize("form", FORMATS)
def test_odd_shapes_and_a_bias(form: str) -> None:
    num_cols, width = 1000, 1200
    weight, x = _odd(form, num_cols, width), _rows(form, 300, width)
    wide = x.dequantise(torch.float32) if isinstance(x, Fp8Rows) else x.float()
    assert weight.bias is not None
    reference = wide @ weight.dequantise().t() + weight.bias.float()
    whole = _finished(x, weight, partial=True)
    assert relative_error(whole, reference) < TOLERANCES[form]
    for num_rows in (1, 3, 17, 100, 129, 256, 257):
        out = _finished(_first(x, slice(num_rows)), weight, partial=True)
        _assert_same(out, whole[:num_rows], f"{num_rows} rows")


def _odd(form: str, num_cols: int, width: int) -> Weight:
    values = torch.randn(num_cols, width, device="cuda")
    bias = torch.randn(num_cols, device="cuda").bfloat16() * 10
    if form == "plain":
        return prepare_weight(values.bfloat16(), bias=bias)
    if form == "channel":
        rows = quantise(values)
        return prepare_weight(rows.values, rows.scales.view(-1), bias)
    scales = torch.rand(-(-num_cols // GROUP), -(-width // GROUP), device="cuda") + 0.5
    return prepare_weight(values.to(FP8), scales, bias)


def test_logits_come_in_fp32() -> None:
    weight, x = _weight("plain", (151936, 1024)), _rows("plain", 5, 1024)
    logits = linear(x, weight, dtype=torch.float32)
    assert isinstance(x, torch.Tensor) and isinstance(logits, torch.Tensor)
    assert logits.dtype == torch.float32
    assert relative_error(logits, x.double() @ weight.values.double().t()) < 1e-5


def test_a_product_launched_early_reads_what_the_kernel_before_wrote() -> None:
    weight, x = _weight("channel", SHAPES[0]), torch.randn(256, 4096, device="cuda").bfloat16()
    for num_rows in (1, 64, 256):
        expected = _finished(quantise(x[:num_rows]), weight, partial=True)
        for _ in range(20):
            out = linear(quantise(x[:num_rows], pdl=True), weight, partial=True, pdl=True)
            finished = out.sum(torch.bfloat16) if isinstance(out, Product) else out
            assert torch.equal(finished, expected)
