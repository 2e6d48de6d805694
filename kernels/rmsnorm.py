"""Root mean square normalisation (Zhang and Sennrich, 2019), and the residual sum before it."""

from __future__ import annotations

import torch


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., width] scaled to unit mean square in fp32, times weight [width]; x's dtype.

    weight may also be [num_heads, width] for x [num_tokens, num_heads, width].
    """
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rmsnorm(x + residual), x + residual), both [num_tokens, width]."""
    total = x + residual
    return rmsnorm(total, weight, eps), total
