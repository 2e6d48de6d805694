"""Tiny models rewritten as FP8 checkpoints: per channel (compressed-tensors) and in blocks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.quantisation import BLOCK, FP8, FP8_MAX, quantise_rows

_PROJECTION = re.compile(r"(_proj|_with_mqa|\.w[123])\.weight$")
_SHARED = {"type": "float", "num_bits": 8, "symmetric": True}
CHANNEL_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_SHARED, "strategy": "channel", "dynamic": False},
            "input_activations": {**_SHARED, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}
BLOCK_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def make_channel_checkpoint(source: Path, target: Path) -> None:
    """Projections of source as e4m3 `weight` and fp32 `weight_scale` [N, 1]."""
    _rewrite(source, target, CHANNEL_CONFIG, "weight_scale", _channel)


def make_block_checkpoint(source: Path, target: Path) -> None:
    """Projections as e4m3 `weight` and bf16 `weight_scale_inv` [ceil(N/128), ceil(K/128)]."""
    _rewrite(source, target, BLOCK_CONFIG, "weight_scale_inv", _block)


def set_config(model_dir: Path, **changes: object) -> None:
    """Changes config.json."""
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rewrite(source: Path, target: Path, settings: dict[str, Any], suffix: str, make: Any) -> None:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if _PROJECTION.search(name)]:
        tensors[name], scale = make(tensors[name])
        tensors[name.removesuffix("weight") + suffix] = scale
    save_file(tensors, target / "model.safetensors")
    set_config(target, quantization_config=settings)


def _channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(weight.shape, dtype=FP8)
    scales = torch.empty(weight.shape[0])
    quantise_rows(weight, values, scales)
    return values, scales[:, None].contiguous()


def _block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = weight.shape[0]
    weight = torch.nn.functional.pad(weight, (0, 0, 0, -num_rows % BLOCK))
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).float()
    scale = (blocks.abs().amax((1, 3)) / FP8_MAX).to(torch.bfloat16)  # [N / 128, K / 128]
    values = (blocks / scale[:, None, :, None].float()).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return values.reshape(weight.shape)[:num_rows].contiguous(), scale
