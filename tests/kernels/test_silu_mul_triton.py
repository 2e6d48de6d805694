"""The SiLU kernel, in the interpreter, against its twin; Products and quantised results."""

from __future__ import annotations

import pytest
import torch

from kernels import silu_mul
from kernels.fp8_quant import GROUP, Fp8Rows, Quantise, quantise
from kernels.product import Product
from tests.support.fp8_rows import assert_same_rows

# exp and division have an ulp of their own.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-10}
DTYPES = list(TOLERANCE)
GROUPS: dict[Quantise, int | None] = {"token": None, "group": GROUP}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 2500])
def test_the_kernel_is_the_twin(width: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(3, 2 * width) * 5).to(dtype)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0
    out = silu_mul._launch_triton(gate_up, None, None)
    expected = silu_mul.silu_mul(gate_up)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("width", [256, 300, 700, 1000])
@pytest.mark.parametrize("kind", GROUPS)
def test_fused_quantisation_is_that_of_the_rounded_result(kind: Quantise, width: int) -> None:
    gate_up = torch.randn(4, 2 * width).half()
    fed = silu_mul._launch_triton(gate_up, None, None)
    out = silu_mul._launch_triton(gate_up, kind, None)
    assert isinstance(out, Fp8Rows) and isinstance(fed, torch.Tensor)
    assert_same_rows(out, quantise(fed, GROUPS[kind]))


def test_a_product_gives_the_bits_of_its_sum() -> None:
    product = Product(
        partials=torch.randn(2, 4, 600), row_scales=torch.rand(4), col_scales=torch.rand(600)
    )
    out = silu_mul._launch_triton(product, None, torch.float16)
    expected = silu_mul._launch_triton(product.sum(torch.float16), None, None)
    assert isinstance(out, torch.Tensor) and isinstance(expected, torch.Tensor)
    assert torch.equal(out, expected)


def test_the_twin_takes_products_and_quantises() -> None:
    product = Product(partials=torch.randn(2, 4, 600))
    fed = silu_mul.silu_mul(product.sum(torch.bfloat16))
    out = silu_mul.silu_mul(product, dtype=torch.bfloat16, quantise="token")
    assert isinstance(out, Fp8Rows) and isinstance(fed, torch.Tensor)
    assert_same_rows(out, quantise(fed))


def test_a_product_needs_a_dtype() -> None:
    with pytest.raises(ValueError, match="dtype: None"):
        silu_mul.silu_mul(Product(partials=torch.randn(1, 2, 64)))
