"""Matrix products as the tuner sees them: with a bf16 weight, or an FP8 one scaled per channel.

Owns the random weights and activations they are tried on. Never times and never chooses; which
tiles are worth a try is for kernels/matmul_candidates.py to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kernels.fp8_quant import FP8, Fp8Rows, quantise
from kernels.linear import launch
from kernels.matmul_candidates import candidates
from kernels.matmul_tiles import DECODE_ROWS, ORDER, Tiles
from kernels.product import Product
from kernels.rmsnorm import add_rmsnorm
from kernels.silu_mul import silu_mul
from kernels.tile_format import Values
from kernels.timing import num_sets
from kernels.weight import Weight

_DTYPE = torch.bfloat16
# Above this, N is no hidden size: what follows is SiLU, not a norm.
_MAX_NORM = 10_240
_PART = 16_384


class Matmul:
    """Key "24576x4096": N and K of the weight. The first set's rows come first in all sets."""

    order: tuple[str, ...] = ORDER
    # bf16 rounding, and the 14 bits of Hopper's FP8 accumulation.
    limit = 1e-2

    def __init__(self, op: str, key: str, max_rows: int) -> None:
        """op: "gemm" or "fp8_gemm"."""
        self.op, self.key = op, key
        self.num_cols, self.width = map(int, key.split("x"))
        self.dtype = FP8 if op == "fp8_gemm" else _DTYPE
        random = torch.Generator("cuda").manual_seed(0)
        self._normal = {"generator": random, "device": "cuda", "dtype": _DTYPE}
        x = torch.randn(max_rows, self.width, **self._normal)
        self._rows = quantise(x) if self.dtype == FP8 else x
        self._residual = torch.randn(DECODE_ROWS, self.num_cols, **self._normal)
        self._weights = [self._weight()]

    def _weight(self) -> Weight:
        values = torch.randn(self.num_cols, self.width, **self._normal)
        if self.dtype != FP8:
            return Weight(values=values)
        rows = quantise(values)
        return Weight(values=rows.values, scales=rows.scales.view(-1))

    def candidates(self, num_rows: int) -> Sequence[Values]:
        """As Tunable."""
        found = candidates(self.num_cols, self.width, self.dtype, num_rows)
        # Fields that are off need no word in a table.
        return [{k: v for k, v in tiles.values().items() if v} for tiles in found]

    def inputs(self, num_rows: int, *, cold: bool) -> Sequence[Any]:
        """As Tunable; (rows, weight)."""
        while cold and len(self._weights) < num_sets(self._weights[0].values.nbytes):
            self._weights.append(self._weight())
        x = self._rows
        if isinstance(x, Fp8Rows):
            x = Fp8Rows(values=x.values[:num_rows], scales=x.scales[:num_rows])
        else:
            x = x[:num_rows]
        return [(x, weight) for weight in (self._weights if cold else self._weights[:1])]

    def run(self, tiles: Values, inputs: Any) -> torch.Tensor | Product:
        """As Tunable."""
        x, weight = inputs
        rows, scales = (x.values, x.scales) if isinstance(x, Fp8Rows) else (x, None)
        return launch(rows, scales, weight, Tiles.of(tiles), _DTYPE, pdl=True)

    def timed(self, tiles: Values, inputs: Any) -> None:
        """As Tunable: few rows with a kernel behind them that adds the splits, as in an engine."""
        out = self.run(tiles, inputs)
        num_rows = len(out.partials[0] if isinstance(out, Product) else out)
        if num_rows > DECODE_ROWS:
            return
        if self.num_cols > _MAX_NORM:
            silu_mul(out, dtype=_DTYPE, pdl=True)
        else:
            add_rmsnorm(out, self._residual[:num_rows], self._residual[0], 1e-6, pdl=True)

    def result(self, out: Any) -> torch.Tensor:
        """As Tunable."""
        return out.sum(_DTYPE) if isinstance(out, Product) else out

    def written(self, out: Any) -> Sequence[torch.Tensor]:
        """As Tunable."""
        return [out.partials if isinstance(out, Product) else out]

    def reference(self, inputs: Any) -> torch.Tensor:
        """As Tunable; part by part, since an fp32 copy of a vocabulary's weight is large."""
        x, weight = inputs
        wide = x.dequantise(torch.float32) if isinstance(x, Fp8Rows) else x.float()
        out = wide.new_empty(wide.shape[0], self.num_cols)
        for start in range(0, self.num_cols, _PART):
            cols = slice(start, start + _PART)
            part = weight.values[cols].float()
            out[:, cols] = (
                wide @ (part if weight.scales is None else part * weight.scales[cols, None]).t()
            )
        return out
