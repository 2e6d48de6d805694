"""RMS norm: values, and bits that do not depend on the number of rows."""

from __future__ import annotations

import pytest
import torch

from kernels import ops

EPS = 1e-6


@pytest.mark.parametrize("width", [16, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_rows(width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(200, width).to(dtype), torch.randn(width).to(dtype)
    whole = ops.rmsnorm(x, weight, EPS)
    for num_rows in range(1, 200):
        assert torch.equal(ops.rmsnorm(x[:num_rows], weight, EPS), whole[:num_rows]), num_rows


def test_values_are_rms_norm() -> None:
    x, weight = torch.randn(5, 3, 16), torch.randn(3, 16)
    expected = torch.nn.functional.rms_norm(x, (16,), eps=EPS) * weight
    torch.testing.assert_close(ops.rmsnorm(x, weight, EPS), expected)


def test_add_rmsnorm_returns_the_sum() -> None:
    x, residual, weight = torch.randn(5, 16), torch.randn(5, 16), torch.randn(16)
    normed, total = ops.add_rmsnorm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rmsnorm(total, weight, EPS))
