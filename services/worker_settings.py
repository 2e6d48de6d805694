"""The flags that a prefill and a decode process share. Owns names, defaults and limits only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kv.path import PATH_CHOICES
from mesh.discovery import SOURCES_HELP, parse_sources
from mesh.service_settings import ServiceSettings
from mesh.settings import setting

MAX_RMSNORM_WARPS = 32  # warps of the largest thread block


def parse_warps(text: str) -> int:
    """The power of two in `text`; ValueError names text and limit. Digits only: no sign, no 0x."""
    sizes = {str(1 << n): 1 << n for n in range(MAX_RMSNORM_WARPS.bit_length())}
    if text not in sizes:
        raise ValueError(f"{text[:40]!r} is not a power of two from 1 to {MAX_RMSNORM_WARPS}")
    return sizes[text]


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(ServiceSettings):
    """Flags shared by `services.prefill` and `services.decode`."""

    model: Path = setting(Path("models/demo"), group="model", help="directory with config.json")
    model_name: str = setting("", group="model", help="public name; default: the directory's name")
    dtype: str = setting(
        "auto",
        group="model",
        help="of weights; auto is the checkpoint's FP8, else fp32 on cpu and bf16 on cuda; fp8 "
        "quantises per output channel at load",
        choices=("auto", "fp32", "bf16", "fp8"),
    )
    kv_dtype: str = setting(
        "auto",
        group="model",
        help="of KV; auto is the dtype of activations, fp8 keeps a scale per vector",
        choices=("auto", "bf16", "fp8"),
    )
    load_format: str = setting(
        "auto",
        group="model",
        help="where weights come from; auto reads *.safetensors, dummy makes random ones for "
        "config.json",
        choices=("auto", "dummy"),
    )
    device: str = setting(
        "cpu",
        group="model",
        help="where tensors and blocks live; cuda is the first GPU of CUDA_VISIBLE_DEVICES",
        choices=("cpu", "cuda"),
    )
    kvstore: tuple[str, ...] = setting((), group="mesh", help=SOURCES_HELP, parse=parse_sources)
    kv_path: str = setting(
        "auto",
        group="mesh",
        help="who moves the blocks of a pull: this worker (read) or the store (write); auto is "
        "read where shared memory, GPUs of one host or RDMA carry it",
        choices=PATH_CHOICES,
    )
    kv_bytes: str | None = setting(
        None,
        group="memory",
        help="memory for KV blocks, such as 2GiB; default: 256MiB on cpu, on cuda what is left of "
        "--gpu-memory-fraction",
    )
    gpu_memory_fraction: float = setting(
        0.9,
        group="memory",
        help="of the GPU's memory for this process: weights, workspace, graphs and KV blocks",
        minimum=0.01,
        maximum=1,
    )
    block_tokens: int = setting(64, group="memory", help="tokens per block", minimum=8, maximum=256)
    max_batch: int = setting(64, group="scheduling", help="most sequences per step", minimum=1)
    chunk_tokens: int = setting(
        512, group="scheduling", help="most prompt tokens computed per step", minimum=16
    )
    trace_step_interval: int = setting(
        100,
        group="telemetry",
        help="where traces are exported, one decode step of so many is a span; 0 is none",
        minimum=0,
        maximum=1_000_000,
    )
    rmsnorm_warps: int | None = setting(
        None,
        group="kernels",
        help="warps per row of the norm on a GPU, a power of two from 1 to 32; none is the tuned "
        "table's choice",
        env="RMSNORM_WARPS",
        parse=parse_warps,
    )
    moe_align: str = setting(
        "auto",
        group="kernels",
        help="who sorts tokens by expert on a GPU; auto is vLLM's kernel where vLLM can be "
        "imported, else kvmesh's",
        choices=("auto", "kvmesh", "vllm"),
    )
