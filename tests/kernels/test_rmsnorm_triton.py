"""The RMS norm kernel, in the interpreter, against its twin; and what its callers may ask for."""

from __future__ import annotations

import pytest
import torch

from kernels import rmsnorm
from kernels.fp8_quant import GROUP, Fp8Rows, Quantise, quantise
from kernels.product import Product
from tests.support.fp8_rows import assert_same_rows

EPS = 1e-6
# One ulp: the squares are added in another order than torch's, and rsqrt has an ulp of its own.
TOLERANCE = {torch.float32: 4e-7, torch.float16: 2.0**-10}
DTYPES = list(TOLERANCE)
GROUPS: dict[Quantise, int | None] = {"token": None, "group": GROUP}


def assert_one_ulp(out: object, expected: object, dtype: torch.dtype) -> None:
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 256, 300])
def test_add_rmsnorm_is_the_twin(width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(*s, width).to(dtype) for s in ((5,), (5,), ()))
    out, total = rmsnorm._launch_triton(x, residual, weight, EPS, None, None)
    expected, expected_total = rmsnorm.add_rmsnorm(x, residual, weight, EPS)
    assert total is not None and torch.equal(total, expected_total)
    assert_one_ulp(out, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rmsnorm_of_heads_is_the_twin(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 6, 64).to(dtype)[:, :3], torch.randn(3, 64).to(dtype)
    out, total = rmsnorm._launch_triton(x, None, weight, EPS, None, None)
    assert total is None
    assert_one_ulp(out, rmsnorm.rmsnorm(x, weight, EPS), dtype)


@pytest.mark.parametrize("kind", GROUPS)
def test_fused_quantisation_is_that_of_the_rounded_result(kind: Quantise) -> None:
    x, residual, weight = (torch.randn(*s, 300).half() for s in ((5,), (5,), ()))
    normed, _ = rmsnorm._launch_triton(x, residual, weight, EPS, None, None)
    out, _ = rmsnorm._launch_triton(x, residual, weight, EPS, kind, None)
    assert isinstance(out, Fp8Rows) and isinstance(normed, torch.Tensor)
    assert_same_rows(out, quantise(normed, GROUPS[kind]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_product_gives_the_bits_of_its_sum(num_splits: int, dtype: torch.dtype) -> None:
    product = Product(
        partials=torch.randn(num_splits, 4, 200),
        row_scales=torch.rand(4),
        col_scales=torch.rand(200),
        bias=torch.randn(200).to(dtype),
    )
    residual, weight = torch.randn(4, 200).to(dtype), torch.randn(200).to(dtype)
    out, total = rmsnorm._launch_triton(product, residual, weight, EPS, None, None)
    finished = product.sum(dtype)
    expected, expected_total = rmsnorm._launch_triton(finished, residual, weight, EPS, None, None)
    assert total is not None and expected_total is not None
    assert torch.equal(total, expected_total)
    assert isinstance(out, torch.Tensor) and isinstance(expected, torch.Tensor)
    assert torch.equal(out, expected)


def test_the_twin_takes_products_and_quantises() -> None:
    product = Product(partials=torch.randn(2, 4, 200))
    residual, weight = torch.randn(4, 200), torch.randn(200)
    normed, total = rmsnorm.add_rmsnorm(product.sum(torch.float32), residual, weight, EPS)
    out, summed = rmsnorm.add_rmsnorm(product, residual, weight, EPS, quantise="group")
    assert torch.equal(summed, total)
    assert isinstance(out, Fp8Rows) and isinstance(normed, torch.Tensor)
    assert_same_rows(out, quantise(normed, GROUP))


@pytest.mark.parametrize("warps", [0, 3, 64, -1])
def test_bad_warps_are_refused_by_the_name_of_the_setting(warps: int) -> None:
    x, weight = torch.randn(2, 64), torch.randn(64)
    with pytest.raises(ValueError, match=f"RMSNORM_WARPS: {warps}; .* 32"):
        rmsnorm.rmsnorm(x, weight, EPS, warps=warps)
    with pytest.raises(ValueError, match="RMSNORM_WARPS"):
        rmsnorm.add_rmsnorm(x, x, weight, EPS, warps=warps)


def test_the_table_has_warps_for_every_width_and_number_of_rows() -> None:
    for width in (16, 1024, 1100, 4096, 12288, 100_000):
        for rows in (1, 8, 9, 64, 65, 512, 513, 10**6):
            rmsnorm.check_warps(rmsnorm.default_warps(width, rows))


def test_heads_cannot_be_quantised() -> None:
    with pytest.raises(ValueError, match="quantised"):
        rmsnorm.rmsnorm(torch.randn(2, 2, 64), torch.randn(2, 64), EPS, quantise="token")
