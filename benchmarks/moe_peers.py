"""vLLM's and LightLLM's Triton kernels for a mixture of experts, for benchmarks/moe.py.

Owns the calls of kernels that are not part of this project: where they cannot be imported, or do
not take the arguments below, there are no calls and one line says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from kernels.fp8_quant import GROUP
from kernels.moe_routing import Routed
from kernels.weight_stack import WeightStack

Call = Callable[[], torch.Tensor]
_VLLM = "vllm.model_executor.layers.fused_moe"
_LIGHTLLM = "lightllm.common.fused_moe.grouped_fused_moe"


def peer_call(
    peer: str, x: torch.Tensor, routed: Routed, gate_up: WeightStack, down: WeightStack
) -> Call | None:
    """The call of "vllm" or "lightllm" on x [num_tokens, H] bf16, tried once; None without it."""
    make = {"vllm": _vllm, "lightllm": _lightllm}[peer]
    try:
        call = make(x, routed, gate_up, down)
        call()
        torch.cuda.synchronize()
    except Exception as error:  # whatever another project's version makes of our arguments
        print(f"{peer} left out: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return None
    return call


def _vllm(x: torch.Tensor, routed: Routed, gate_up: WeightStack, down: WeightStack) -> Call:
    fused: Any = importlib.import_module(f"{_VLLM}.fused_moe").fused_experts
    config = None
    if gate_up.scales is not None and down.scales is not None:
        make: Any = importlib.import_module(f"{_VLLM}.config").fp8_w8a8_moe_quant_config
        blocks = gate_up.scales.dim() == 3
        scales = (s if blocks else s[..., None] for s in (gate_up.scales, down.scales))
        config = make(
            **dict(zip(("w1_scale", "w2_scale"), scales, strict=True)),
            per_act_token_quant=not blocks,
            per_out_ch_quant=not blocks,
            block_shape=[GROUP, GROUP] if blocks else None,
        )

    def call() -> torch.Tensor:
        return fused(
            x,
            gate_up.values,
            down.values,
            routed.weights,
            routed.expert_ids,
            quant_config=config,
        )

    return call


def _lightllm(x: torch.Tensor, routed: Routed, gate_up: WeightStack, down: WeightStack) -> Call:
    fused: Any = importlib.import_module(_LIGHTLLM).fused_experts_impl

    def call() -> torch.Tensor:
        return fused(
            hidden_states=x,
            w1=gate_up.values,
            w2=down.values,
            topk_weights=routed.weights,
            topk_ids=routed.expert_ids,
            inplace=False,
            use_fp8_w8a8=gate_up.scales is not None,
            w1_scale=gate_up.scales,
            w2_scale=down.scales,
        )

    return call
