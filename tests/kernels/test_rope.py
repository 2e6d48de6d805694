"""Rotary embedding against a complex rotation."""

from __future__ import annotations

import torch

from kernels import ops


def test_rope_rotates_pairs_by_their_angle() -> None:
    inv_freq = 1.0 / 100.0 ** (torch.arange(0, 16, 2) / 16)
    cos, sin = ops.rope_tables(inv_freq, 50, torch.float32)
    x = torch.randn(50, 3, 16)
    out = ops.rope(x, cos[:, None], sin[:, None])
    rotation = torch.polar(torch.ones(50, 1, 8), (torch.arange(50)[:, None] * inv_freq)[:, None])
    expected = torch.complex(x[..., :8], x[..., 8:]) * rotation
    torch.testing.assert_close(out, torch.cat((expected.real, expected.imag), -1))


def test_position_zero_changes_nothing() -> None:
    cos, sin = ops.rope_tables(torch.ones(4), 1, torch.bfloat16)
    x = torch.randn(1, 2, 8, dtype=torch.bfloat16)
    assert torch.equal(ops.rope(x, cos[:, None], sin[:, None]), x)
