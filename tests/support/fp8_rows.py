"""How quantised rows are compared, on a GPU and in Triton's interpreter."""

from __future__ import annotations

import torch

from kernels.fp8_quant import Fp8Rows

INTERPRETER_WRONG_BYTES = 0.05
"""The interpreter loses the carry when a mantissa rounds up to the next power of two: 2.4 % of
random bytes (Triton 3.6 and 3.9). Every other byte must be right."""


def assert_same_rows(out: Fp8Rows, expected: Fp8Rows) -> None:
    """The same scales and bytes, but for what the interpreter gets wrong on a CPU."""
    assert torch.equal(out.scales, expected.scales)
    wrong = (bytes_of(out) != bytes_of(expected)).float().mean().item()
    assert wrong <= (0.0 if out.values.is_cuda else INTERPRETER_WRONG_BYTES)


def bytes_of(rows: Fp8Rows) -> torch.Tensor:
    """[num_rows, width] uint8."""
    return rows.values.view(torch.uint8)
