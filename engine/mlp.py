"""The feed-forward of a layer: one dense network, or a mixture of experts.

Owns the order of its operations; the arithmetic is in kernels.ops. Holds no request state.
"""

from __future__ import annotations

from typing import Protocol

import torch

from engine.moe_config import MoeConfig
from kernels import ops

Rows = torch.Tensor | ops.Fp8Rows
"""Activations [num_rows, width]: the model's dtype, or FP8 with scales in front of FP8 weights."""


def quantised(x: torch.Tensor, kind: ops.Quantise | None, *, pdl: bool) -> Rows:
    """x [num_rows, width] as weights of a format take it."""
    if kind is None:
        return x
    return ops.quantise(x, ops.GROUP if kind == "group" else None, pdl=pdl)


class Mlp(Protocol):
    """Feed-forward of one layer."""

    @property
    def input_kind(self) -> ops.Quantise | None:
        """How `forward` wants its rows quantised."""
        ...

    def forward(self, x: Rows, *, pdl: bool) -> torch.Tensor | ops.Product:
        """x [num_rows, hidden_size] -> the same shape, before the residual is added."""
        ...


class DenseMlp:
    """SiLU(gate) * up, then down."""

    def __init__(
        self,
        gate_up: ops.Weight,
        down: ops.Weight,
        *,
        dtype: torch.dtype,
        quantise: ops.Quantise | None,
    ) -> None:
        self._gate_up, self._down = gate_up, down
        self._dtype = dtype
        self.input_kind: ops.Quantise | None = quantise

    def forward(self, x: Rows, *, pdl: bool) -> torch.Tensor | ops.Product:
        """See Mlp."""
        inner = ops.linear(x, self._gate_up, dtype=self._dtype, partial=True, pdl=pdl)
        fed = ops.silu_mul(inner, quantise=self.input_kind, dtype=self._dtype, pdl=pdl)
        return ops.linear(fed, self._down, dtype=self._dtype, partial=True, pdl=pdl)


class SparseMlp:
    """Each token through the experts that the router chooses for it, and through shared ones.

    The router is never quantised: it takes rows of the model's dtype, or of fp32 if it is fp32.
    """

    input_kind: None = None

    def __init__(
        self,
        moe: MoeConfig,
        router: ops.Weight,
        gate_up: ops.WeightStack,
        down: ops.WeightStack,
        *,
        dtype: torch.dtype,
        quantise: ops.Quantise | None,
        align: ops.Align,
        correction: torch.Tensor | None = None,
        shared: DenseMlp | None = None,
    ) -> None:
        """align: see ops.moe_mlp; correction: the bias of ops.moe_route; shared: the experts that
        every token goes through.
        """
        self._routing, self._router, self._correction = moe.routing, router, correction
        self._shared = shared
        self._gate_up, self._down = gate_up, down
        self._dtype, self._align = dtype, align
        self._quantise: ops.Quantise | None = quantise

    def forward(self, x: Rows, *, pdl: bool) -> torch.Tensor:
        """See Mlp."""
        assert isinstance(x, torch.Tensor)
        logits = ops.linear(x.to(self._router.values.dtype), self._router, pdl=pdl)
        routed = ops.moe_route(logits, self._routing, self._correction)
        rows = quantised(x, self._quantise, pdl=pdl)
        out = ops.moe_mlp(
            rows, routed, self._gate_up, self._down, dtype=self._dtype, align=self._align
        )
        if self._shared is None:
            return out
        shared = self._shared.forward(rows, pdl=pdl)
        return out + (shared.sum(self._dtype) if isinstance(shared, ops.Product) else shared)
