"""SiLU(gate) * up over a fused projection (Shazeer, 2020)."""

from __future__ import annotations

import torch


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [num_tokens, 2 * width], gate first -> [num_tokens, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.contiguous()) * up
