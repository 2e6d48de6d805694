"""Weights of one shape in one tensor: a projection of all experts, or of all heads.

Owns their form, and the product of each with rows of its own. Never chooses an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.linear import TILES, linear, prepare_weight
from kernels.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStack:
    """values [count, N, K], contiguous; scales: as of kernels.weight.Weight with count in front.

    row_tiles: on a CPU, as there.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    row_tiles: tuple[int, ...] = TILES[:1]

    def of(self, index: int) -> Weight:
        """One of them."""
        scales = None if self.scales is None else self.scales[index]
        return Weight(values=self.values[index], scales=scales, row_tiles=self.row_tiles)


def prepare_stack(
    values: torch.Tensor,
    scales: torch.Tensor | None = None,
    seen: dict[tuple[int, ...], tuple[int, ...]] | None = None,
) -> WeightStack:
    """values, scales as WeightStack says (ValueError where they do not fit), with tile sizes.

    seen: as prepare_weight takes it.
    """
    first = prepare_weight(values[0], None if scales is None else scales[0], None, seen)
    return WeightStack(values=values, scales=scales, row_tiles=first.row_tiles or TILES[:1])


def stacked_linear(x: torch.Tensor, weights: WeightStack) -> torch.Tensor:
    """x [num_rows, count, K] -> [num_rows, count, N], each by its own weight, on a CPU.

    A row's bits depend on the row and the weights alone. Weights of a floating-point type only.
    """
    tiles = weights.row_tiles
    out = x.new_empty(*x.shape[:2], weights.values.shape[1])
    for index, weight in enumerate(weights.values):
        out[:, index] = linear(x[:, index].contiguous(), weight, tiles=tiles)
    return out
