"""The model of a worker process: from its flags to a runner, and the fingerprint of its blocks.

Owns how flags become the engine's options. Never runs a step, never keeps what it loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.cuda_runner import CudaRunner
from engine.dummy import dummy_weights_id
from engine.runner import ModelRunner
from engine.runners import RunnerOptions, load_runner
from kv.block import model_fingerprint
from kv.layout import LAYOUT_VERSION
from mesh.settings import parse_bytes
from services.worker_settings import WorkerSettings

CPU_KV_BYTES = "256MiB"
"""For KV blocks on a CPU where nothing else is asked for."""


def load_model(
    settings: WorkerSettings, progress: Callable[[str], None]
) -> ModelRunner | CudaRunner:
    """Loads what the flags ask for; ModelError or ValueError says what does not fit."""
    kv_bytes = settings.kv_bytes
    if kv_bytes is None and settings.device == "cpu":
        kv_bytes = CPU_KV_BYTES
    options = RunnerOptions(
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        load_format=settings.load_format,
        block_tokens=settings.block_tokens,
        kv_bytes=None if kv_bytes is None else parse_bytes(kv_bytes),
        memory_fraction=settings.gpu_memory_fraction,
        max_batch=settings.max_batch,
        chunk_tokens=settings.chunk_tokens,
        rmsnorm_warps=settings.rmsnorm_warps,
        moe_align=settings.moe_align,
    )
    return load_runner(settings.model, device=settings.device, options=options, progress=progress)


def fingerprint_of(settings: WorkerSettings, runner: ModelRunner | CudaRunner) -> bytes:
    """32 bytes that stand for all that the bytes of the runner's blocks depend on."""
    is_dummy = settings.load_format == "dummy"
    return model_fingerprint(
        settings.model,
        kv_dtype=str(runner.precision),
        layout_version=LAYOUT_VERSION,
        block_tokens=settings.block_tokens,
        weights_id=dummy_weights_id(torch.device(settings.device)) if is_dummy else None,
    )
