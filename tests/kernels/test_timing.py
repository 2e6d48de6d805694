"""The gate before every timing: a relative error that nothing passes by being undefined."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.timing import num_sets, relative_error, require_close


def test_the_error_is_relative_to_the_reference() -> None:
    reference = torch.randn(1100, 3, dtype=torch.float64)
    before = reference.clone()
    noise = torch.randn(1100, 3, dtype=torch.float64)
    expected = (1e-3 * noise).norm() / reference.norm()
    assert relative_error(reference + 1e-3 * noise, reference) == pytest.approx(expected.item())
    assert torch.equal(reference, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_close(value: float) -> None:
    reference = torch.ones(4, 4)
    out = reference.clone()
    out[3, 3] = value
    assert relative_error(out, reference) == math.inf
    with pytest.raises(ValueError, match="sum: relative error inf"):
        require_close("sum", out, reference, 1.0)


def test_another_shape_is_refused_even_if_it_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"shape \[1, 4\], reference \[4, 4\]"):
        require_close("sum", torch.ones(1, 4), torch.ones(4, 4), 1.0)


def test_sets_together_exceed_the_cache() -> None:
    assert num_sets(100_000_000) == 2
    assert 16 * num_sets(2**20) > 256
    assert num_sets(10**10) == 2
    assert num_sets(1) == 256
