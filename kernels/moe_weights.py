"""Experts' weights as the grouped products take them: all experts of one projection, stacked.

Owns their form. Never computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.linear import TILES, prepare_weight
from kernels.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One projection of all experts: values [num_experts, N, K], contiguous.

    scales: as of kernels.weight.Weight with num_experts in front; row_tiles: on a CPU, as there.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    row_tiles: tuple[int, ...] = TILES[:1]

    def of(self, expert: int) -> Weight:
        """One expert's weight."""
        scales = None if self.scales is None else self.scales[expert]
        return Weight(values=self.values[expert], scales=scales, row_tiles=self.row_tiles)


def prepare_experts(
    values: torch.Tensor,
    scales: torch.Tensor | None = None,
    seen: dict[tuple[int, ...], tuple[int, ...]] | None = None,
) -> ExpertWeights:
    """values, scales as ExpertWeights says (ValueError where they do not fit), with tile sizes.

    seen: as prepare_weight takes it.
    """
    first = prepare_weight(values[0], None if scales is None else scales[0], None, seen)
    return ExpertWeights(values=values, scales=scales, row_tiles=first.row_tiles or TILES[:1])
