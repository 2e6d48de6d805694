"""From a model directory to what a runner is made of: precision, parameters, decoder, cache.

Owns what --dtype, --kv-dtype and --load-format mean. Never runs a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import ModelConfig
from engine.decoder import Decoder
from engine.dummy import dummy_weights
from engine.errors import ModelError
from engine.kv_cache import KvCache
from engine.memory import MemoryPlan
from engine.quantisation import FP8, WeightFormat
from engine.weights import Parameters, load_weights
from kernels import ops
from kv.layout import BlockLayout

DTYPES = ("auto", "fp32", "bf16", "fp8")
KV_DTYPES = ("auto", "bf16", "fp8")
LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """dtype: of activations, norms, embeddings; how projections are stored; what KV is kept in."""

    dtype: torch.dtype
    weight_format: WeightFormat
    kv_dtype: torch.dtype

    @classmethod
    def resolve(
        cls, config: ModelConfig, dtype: str, kv_dtype: str, device: torch.device
    ) -> Precision:
        """`auto` is the checkpoint's FP8, else fp32 on a CPU and bf16 on a GPU; KV follows dtype.

        ValueError for an unknown name, ModelError for what the checkpoint cannot be.
        """
        for name, value, known in (("dtype", dtype, DTYPES), ("kv_dtype", kv_dtype, KV_DTYPES)):
            if value not in known:
                raise ValueError(f"{name}: {value!r}; one of {list(known)}")
        is_fp8 = config.checkpoint_format is not WeightFormat.PLAIN
        if is_fp8 and dtype not in ("auto", "fp8"):
            raise ModelError(f"dtype: {dtype}; the checkpoint's weights are FP8, use auto or fp8")
        if dtype == "auto":
            dtype = "fp8" if is_fp8 else "fp32" if device.type == "cpu" else "bf16"
        weight_format = config.checkpoint_format
        if dtype == "fp8" and not is_fp8:
            weight_format = WeightFormat.CHANNEL
        model_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        if kv_dtype == "bf16" and model_dtype != torch.bfloat16:
            raise ValueError("kv_dtype: bf16; KV of an fp32 model is fp32 (auto) or fp8")
        kept = FP8 if kv_dtype == "fp8" else model_dtype
        return cls(dtype=model_dtype, weight_format=weight_format, kv_dtype=kept)

    def __str__(self) -> str:
        """What a block's bytes depend on besides model and layout; part of the fingerprint."""
        text = str(self.kv_dtype)
        if self.weight_format is not WeightFormat.PLAIN:
            text += f", weights {self.weight_format.value}"
        return text if self.kv_dtype == self.dtype else f"{text}, model {self.dtype}"


def block_layout(config: ModelConfig, block_tokens: int, kv_dtype: torch.dtype) -> BlockLayout:
    """The layout of this model's blocks."""
    return BlockLayout(
        num_kv_heads=config.num_kv_heads,
        num_layers=config.num_layers,
        block_tokens=block_tokens,
        head_dim=config.head_dim,
        dtype_num_bytes=kv_dtype.itemsize,
        scale_num_bytes=KvCache.scale_num_bytes(kv_dtype),
        num_parts=1 if config.mla is not None else 2,
    )


def load_parameters(
    model_dir: Path,
    config: ModelConfig,
    precision: Precision,
    *,
    device: torch.device,
    load_format: str,
    progress: Callable[[str], None],
) -> Parameters:
    """The checkpoint's parameters, or random ones (`dummy`)."""
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format: {load_format!r}; one of {list(LOAD_FORMATS)}")
    kinds: dict[str, Any] = {
        "device": device,
        "dtype": precision.dtype,
        "weight_format": precision.weight_format,
    }
    if load_format == "dummy":
        progress("making random weights (load-format dummy)")
        return dummy_weights(config, **kinds)
    return load_weights(model_dir, config, **kinds, progress=progress)


def load_decoder_and_cache(
    model_dir: Path,
    config: ModelConfig,
    precision: Precision,
    plan: MemoryPlan,
    *,
    layout: BlockLayout,
    device: torch.device,
    load_format: str,
    progress: Callable[[str], None],
    tables: ops.TileTables | None = None,
    rmsnorm_warps: int | None = None,
    moe_align: str = "auto",
) -> tuple[Decoder, KvCache]:
    """Takes the memory of the plan."""
    progress(str(plan))
    cache = KvCache(layout, plan.num_blocks, device, precision.kv_dtype)
    parameters = load_parameters(
        model_dir, config, precision, device=device, load_format=load_format, progress=progress
    )
    if device.type == "cpu":
        progress("measuring exact tile sizes")
    decoder = Decoder(
        config,
        parameters,
        context_len=min(config.context_len, plan.num_blocks * layout.block_tokens),
        weight_format=precision.weight_format,
        tables=tables,
        rmsnorm_warps=rmsnorm_warps,
        moe_align=moe_align,
    )
    return decoder, cache
