"""Which runner computes on which device, and loading it.

Owns the way from settings to a runner that is ready for its first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from engine.config import ModelConfig
from engine.cuda_graphs import bucket_sizes
from engine.cuda_runner import CudaRunner
from engine.errors import ModelError
from engine.loading import Precision, block_layout, load_decoder_and_cache
from engine.memory import (
    DEFAULT_FRACTION,
    DeviceMemory,
    MemoryNeeds,
    MemoryPlan,
    graphs_num_bytes,
    plan_memory,
    step_num_bytes,
    weights_num_bytes,
)
from engine.prompt_graphs import prompt_sizes
from engine.ragged import padded
from engine.runner import ModelRunner
from kernels import ops
from kv.layout import BlockLayout

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How a model is loaded and run.

    dtype, kv_dtype, load_format: see engine.loading. kv_bytes, num_blocks: size of the cache;
    without both it is what is left of memory_fraction of the GPU (a CPU needs one). The others are
    for a GPU: max_batch, chunk_tokens: the largest step there will be; pdl, graphs: see CudaRunner;
    rmsnorm_warps: warps per row; moe_align: see ops.alignment; tables_dir: the user's own tile
    tables.
    """

    dtype: str = "auto"
    kv_dtype: str = "auto"
    load_format: str = "auto"
    block_tokens: int = 64
    kv_bytes: int | None = None
    num_blocks: int | None = None
    memory_fraction: float = DEFAULT_FRACTION
    max_batch: int = 64
    chunk_tokens: int = 512
    pdl: bool = True
    graphs: bool = True
    rmsnorm_warps: int | None = None
    moe_align: str = "auto"
    tables_dir: Path | None = None


def load_runner(
    model_dir: Path, *, device: str, options: RunnerOptions, progress: Progress
) -> ModelRunner | CudaRunner:
    """Loads a model directory onto "cpu" or "cuda"; progress gets a line per step of loading.

    ModelError or ValueError says what does not fit.
    """
    if torch.device(device).type != "cpu":
        if not torch.cuda.is_available():
            raise ModelError(f"device: {device}; torch {torch.__version__} sees no CUDA GPU")
        return load_cuda_runner(model_dir, device=device, options=options, progress=progress)
    return ModelRunner.load(
        model_dir,
        device=device,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        load_format=options.load_format,
        block_tokens=options.block_tokens,
        kv_bytes=options.kv_bytes,
        num_blocks=options.num_blocks,
        progress=progress,
    )


def load_cuda_runner(
    model_dir: Path,
    *,
    device: str = "cuda",
    options: RunnerOptions,
    progress: Progress = lambda line: None,
) -> CudaRunner:
    """As load_runner; on a CPU over the kernels' twins, for tests."""
    config, target = _load_config(model_dir, device), torch.device(device)
    precision = Precision.resolve(config, options.dtype, options.kv_dtype, target)
    layout = block_layout(config, options.block_tokens, precision.kv_dtype)
    tables = _tables_for(target, options.tables_dir, progress)
    decoder, cache = load_decoder_and_cache(
        model_dir,
        config,
        precision,
        _memory_plan(config, precision, layout, target, options),
        layout=layout,
        device=target,
        load_format=options.load_format,
        progress=progress,
        tables=tables,
        rmsnorm_warps=options.rmsnorm_warps,
        moe_align=options.moe_align,
    )
    runner = CudaRunner(
        config,
        decoder,
        cache,
        precision,
        max_batch=options.max_batch,
        chunk_tokens=options.chunk_tokens,
        pdl=options.pdl,
        graphs=options.graphs,
        tables=tables,
        progress=progress,
    )
    if target.type == "cuda":
        progress(f"memory: {DeviceMemory.of(target)}")
    return runner


def _load_config(model_dir: Path, device: str) -> ModelConfig:
    """ModelError, too, if there are no kernels of a GPU for the model."""
    config = ModelConfig.load(model_dir)
    if config.mla is not None:
        raise ModelError(f"device: {device}; {config.architecture} runs on a CPU only")
    return config


def _memory_plan(
    config: ModelConfig,
    precision: Precision,
    layout: BlockLayout,
    device: torch.device,
    options: RunnerOptions,
) -> MemoryPlan:
    num_rows = padded(options.max_batch) + padded(options.chunk_tokens)
    num_graphs = 0
    if options.graphs:
        prompts = prompt_sizes(options.chunk_tokens)
        num_graphs = len(bucket_sizes(options.max_batch)) + len(prompts)
        num_rows += prompts[-1]  # in the graphs' own memory
    needs = MemoryNeeds(
        weights=weights_num_bytes(config, precision.weight_format, precision.dtype),
        workspace=step_num_bytes(config, num_rows, options.max_batch, precision.dtype),
        graphs=graphs_num_bytes(num_graphs),
    )
    return plan_memory(
        needs,
        block_num_bytes=layout.num_bytes,
        block_tokens=layout.block_tokens,
        kv_bytes=options.kv_bytes,
        num_blocks=options.num_blocks,
        device=DeviceMemory.of(device) if device.type == "cuda" else None,
        fraction=options.memory_fraction,
    )


def _tables_for(
    device: torch.device, tables_dir: Path | None, progress: Progress
) -> ops.TileTables | None:
    """Tile tables for a GPU, the user's own in tables_dir before those that ship."""
    if device.type != "cuda":
        return None
    tables = ops.TileTables.load(
        torch.cuda.get_device_name(device),
        triton.__version__,
        tables_dir,
        capability=torch.cuda.get_device_capability(device),
    )
    for note in tables.notes:
        progress(note)
    return tables
