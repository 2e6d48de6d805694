"""SiLU times up: values, and bits that do not depend on where an element lies."""

from __future__ import annotations

import pytest
import torch

from kernels import ops


@pytest.mark.parametrize("width", [16, 37, 176])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_rows(width: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(200, 2 * width) * 5).to(dtype)
    whole = ops.silu_mul(gate_up)
    for num_rows in range(1, 200):
        assert torch.equal(ops.silu_mul(gate_up[:num_rows]), whole[:num_rows]), num_rows
    assert torch.equal(ops.silu_mul(gate_up[150:151])[0], whole[150])


def test_values_are_silu_times_up() -> None:
    gate, up = torch.randn(7, 20) * 30, torch.randn(7, 20)
    gate[0, 0], gate[0, 1] = -200.0, 200.0
    out = ops.silu_mul(torch.cat((gate, up), -1))
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)
