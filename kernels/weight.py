"""A weight as the matrix products take it: values, scales, bias, tile sizes.

Owns which formats exist. Never computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.fp8_quant import FP8, GROUP
from kernels.matmul_tiles import MatmulPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """values [N, K], contiguous; bias [N] or None.

    scales: None for bf16, fp16 and fp32 values; for e4m3 [N] fp32 per output channel, or
    [ceil(N / 128), ceil(K / 128)] fp32 per block (DeepSeek-V3's and Qwen's `weight_scale_inv`).
    row_tiles: see kernels.linear.exact_tiles, on a CPU; plan: on a GPU.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    row_tiles: tuple[int, ...] = ()
    plan: MatmulPlan | None = None

    def __post_init__(self) -> None:
        """ValueError where the shapes do not fit each other."""
        num_cols, width = self.values.shape
        quantised = self.values.dtype == FP8
        if quantised != (self.scales is not None):
            raise ValueError(f"weight of {self.values.dtype} and scales must come together or not")
        blocks = (-(-num_cols // GROUP), -(-width // GROUP))
        if self.scales is not None and tuple(self.scales.shape) not in ((num_cols,), blocks):
            raise ValueError(
                f"scales {list(self.scales.shape)} of a weight {[num_cols, width]}: "
                f"[{num_cols}] or {list(blocks)} is needed"
            )
        if self.bias is not None and self.bias.shape != (num_cols,):
            raise ValueError(f"bias {list(self.bias.shape)} of a weight {[num_cols, width]}")

    @property
    def block_scaled(self) -> bool:
        """Whether scales are per 128 x 128 block."""
        return self.scales is not None and self.scales.dim() == 2

    @property
    def num_groups(self) -> int:
        """Scales per activation row that the format needs."""
        return -(-self.values.shape[1] // GROUP) if self.block_scaled else 1

    def dequantise(self) -> torch.Tensor:
        """[N, K] fp32."""
        num_cols, width = self.values.shape
        wide = self.values.float()
        if self.scales is None:
            return wide
        if self.block_scaled:
            rows = self.scales.repeat_interleave(GROUP, 0)[:num_cols]
            return wide * rows.repeat_interleave(GROUP, 1)[:, :width]
        return wide * self.scales[:, None]
