"""Rotary position embedding (Su et al., 2021), half-split as in the Hugging Face checkpoints."""

from __future__ import annotations

import torch


def rope_tables(
    inv_freq: torch.Tensor, num_positions: int, dtype: torch.dtype, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, signed sin) * scale, each [num_positions, head_dim], of inv_freq [head_dim / 2] fp32.

    The sine's left half is negated, so that a rotation is x * cos + swapped(x) * sin.
    """
    positions = torch.arange(num_positions, device=inv_freq.device, dtype=torch.float32)
    angles = positions[:, None] * inv_freq[None, :]
    cos, sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [num_tokens, num_heads, head_dim] rotated by cos, signed sin [num_tokens, 1, head_dim]."""
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return (x * cos).add_(swapped.mul_(sin))
