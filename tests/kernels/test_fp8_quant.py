"""FP8 quantisation: scales, what is stored, and the kernel against its twin."""

from __future__ import annotations

import pytest
import torch

from kernels import fp8_quant
from kernels.fp8_quant import GROUP, quantise
from tests.support.fp8_rows import assert_same_rows

# e4m3 keeps three bits after the leading one.
HALF_ULP = 2.0**-4


@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize("width", [128, 300])
def test_values_come_back_within_half_an_ulp(width: int, group: int | None) -> None:
    x = torch.randn(7, width) * torch.logspace(-3, 3, 7)[:, None]
    rows = quantise(x, group)
    assert rows.values.shape == (7, width)
    assert rows.scales.shape == (7, 1 if group is None else -(-width // GROUP))
    # Below the smallest normal value, 2 ** -6 * scale, the step is 2 ** -9 * scale.
    error = (rows.dequantise(torch.float32) - x).abs()
    smallest = 2.0**-10 * rows.scales.amax(1, keepdim=True)
    assert (error <= HALF_ULP * x.abs() + smallest).all()


def test_the_largest_value_of_a_group_is_stored_as_448() -> None:
    x = torch.randn(4, 256)
    stored = quantise(x, GROUP).values.float().view(4, 2, GROUP).abs().amax(-1)
    assert (stored == 448).all()


def test_a_row_of_zeros_stays_zero() -> None:
    rows = quantise(torch.zeros(2, 64))
    assert (rows.dequantise(torch.float32) == 0).all()
    assert torch.isfinite(rows.scales).all()


def test_bits_do_not_depend_on_the_number_of_rows() -> None:
    x = torch.randn(50, 256).bfloat16()
    whole = quantise(x)
    for num_rows in range(1, 50):
        part = quantise(x[:num_rows])
        assert torch.equal(part.scales, whole.scales[:num_rows])
        assert torch.equal(part.values.view(torch.uint8), whole.values.view(torch.uint8)[:num_rows])


def test_other_groups_and_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="group: 64"):
        quantise(torch.zeros(2, 128), 64)
    with pytest.raises(ValueError, match="num_rows, width"):
        quantise(torch.zeros(2, 2, 128))


@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize("width", [96, 300, 1024, 1500])
def test_the_kernel_is_the_twin(width: int, group: int | None) -> None:
    x = torch.randn(3, 2 * width).half()[:, :width]  # rows with a stride
    assert_same_rows(fp8_quant._launch_triton(x, group), quantise(x, group))
