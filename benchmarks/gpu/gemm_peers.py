"""LightLLM's FP8 product, for benchmarks/gpu/gemm.py.

Owns the calls of a kernel that lies in .peers/, which is not part of this project: without the file
there are no calls. .peers/lightllm_scaled_mm.py is LightLLM's scaled_mm_per_token_kernel.py
(lightllm/common/basemodel/triton_kernel/quantization) with `config` as an argument in place of its
tuner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.gpu.peers import peer_module
from kernels.fp8_quant import Fp8Rows
from kernels.weight import Weight

MAX_ROWS = 256
"""Its tile sizes are those of decode steps."""
# block_n, block_k, num_stages: the best of those that it tunes over differ from size to size.
_TILES = ((64, 128, 6), (64, 256, 4), (128, 128, 4), (128, 256, 3))

Call = Callable[[], object]


def lightllm_calls(x: Fp8Rows, weights: Sequence[Weight]) -> list[list[Call]]:
    """By configuration, a call for each of the weights (scaled per channel) that returns
    [num_rows, N] bf16; x has one scale a row. Empty above MAX_ROWS.
    """
    module, num_rows = peer_module("lightllm_scaled_mm.py"), x.values.shape[0]
    if module is None or num_rows > MAX_ROWS:
        return []
    out = torch.empty(
        num_rows, weights[0].values.shape[0], device=x.values.device, dtype=torch.bfloat16
    )
    return [
        [
            partial(module.scaled_mm_per_token, x.values, w.values, x.scales, w.scales, out, config)
            for w in weights
        ]
        for config in _configs(num_rows)
    ]


def _configs(num_rows: int) -> list[dict[str, int]]:
    return [
        {
            "BLOCK_M": 16 if num_rows <= 16 else 64,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP_M": 8,
            "num_stages": num_stages,
            "num_warps": 4,
        }
        for block_n, block_k, num_stages in _TILES
    ]
