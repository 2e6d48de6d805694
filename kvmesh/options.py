"""The flags of `kvmesh up` and what they may be.

Owns the limits, so that a value that cannot work is refused before anything is spawned. Those of
sizes are the services' own (mesh/settings.py, services/worker_settings.py), which the face never
imports. Ports are not looked at here: whether one is free is the business of kvmesh/ports.py.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from mesh.settings import parse_bytes

LOOPBACK = "127.0.0.1"
MAX_PROCESSES = 64
MAX_PORT = 65535
MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS = 8, 256
MIN_BATCH = 1
MIN_CHUNK_TOKENS = 16
MIN_DRAIN_S = 0
CPU_KV_BYTES = "256MiB"
STORE_BYTES = {"cpu": "256MiB", "cuda": "4GiB"}
WORKERS_GPU_FRACTION = 0.8


class PlanError(Exception):
    """The mesh cannot be started as asked; the message names the flag, the value and the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshOptions:
    """The flags of `kvmesh up`; port 0 picks a free one.

    admin_port None is port + 1, http_port None port + 2 (or free ones beside a port of 0).
    kv_bytes, block_tokens, max_batch and chunk_tokens None are the workers' own defaults;
    metrics_port is where the gateway serves Prometheus, the others behind it; None is nowhere;
    store_bytes None is STORE_BYTES of the device; store_host and store_disk None are no such tier.
    """

    model: Path
    model_name: str = ""
    num_prefill: int = 1
    num_decode: int = 1
    num_kvstore: int = 1
    host: str = LOOPBACK
    port: int = 50051
    admin_port: int | None = None
    http_port: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    load_format: str = "auto"
    kv_path: str = "auto"
    kv_bytes: str | None = None
    store_bytes: str | None = None
    store_host: str | None = None
    store_disk: Path | None = None
    store_disk_bytes: str = "1GiB"
    block_tokens: int | None = None
    max_batch: int | None = None
    chunk_tokens: int | None = None
    log_format: str = "text"
    log_level: str = "info"
    drain_s: float = 10.0
    metrics_port: int | None = None

    @property
    def store_size(self) -> str:
        """Memory of each kvstore."""
        return self.store_bytes or STORE_BYTES[self.device]

    @property
    def gpu_memory_fraction(self) -> float:
        """Of one GPU for each worker: all share it, beside the kvstores and CUDA itself."""
        return round(WORKERS_GPU_FRACTION / (self.num_prefill + self.num_decode), 3)


def check_options(options: MeshOptions) -> None:
    """Raises PlanError for the first option that cannot work on this machine."""
    _check_model(options)
    for flag, value, low, high in (
        ("--prefill", options.num_prefill, 1, MAX_PROCESSES),
        ("--decode", options.num_decode, 1, MAX_PROCESSES),
        ("--kvstore", options.num_kvstore, 1, MAX_PROCESSES),
        ("--block-tokens", options.block_tokens, MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS),
        ("--max-batch", options.max_batch, MIN_BATCH, math.inf),
        ("--chunk-tokens", options.chunk_tokens, MIN_CHUNK_TOKENS, math.inf),
        ("--drain-s", options.drain_s, MIN_DRAIN_S, math.inf),
    ):
        if value is not None and not (low <= value <= high and value < math.inf):
            words = f"{low} to {high}" if high < math.inf else f"a number of at least {low}"
            raise PlanError(f"{flag} {value}: give {words}")
    _check_metrics(options)
    _check_memory(options)
    _check_host(options)
    _check_disk(options)


def _check_model(options: MeshOptions) -> None:
    """What the services will look for in the model's directory is there."""
    model = options.model
    if not (model / "config.json").is_file():
        raise PlanError(
            f"--model {model}: no config.json there; give a directory in Hugging Face layout "
            "(config.json, tokenizer files, *.safetensors)"
        )
    if not (model / "tokenizer.json").is_file():
        raise PlanError(
            f"--model {model}: no tokenizer.json there; the gateway needs the model's fast "
            "tokenizer, with --load-format dummy too"
        )
    if options.load_format != "dummy" and not any(model.glob("*.safetensors")):
        raise PlanError(
            f"--model {model}: no *.safetensors there; kvmesh up --load-format dummy makes random "
            "weights"
        )


def _check_metrics(options: MeshOptions) -> None:
    """Every process gets a port: the gateway the first, then kvstores, prefills and decodes."""
    first = options.metrics_port
    last = MAX_PORT - options.num_kvstore - options.num_prefill - options.num_decode
    if first is not None and not 1 <= first <= last:
        raise PlanError(f"--metrics-port {first}: give 1 to {last}, a port for each process")


def memory_num_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_memory(options: MeshOptions) -> None:
    """What workers on the CPU and the stores ask for together fits into this machine."""
    num_workers = options.num_prefill + options.num_decode
    kv_bytes = CPU_KV_BYTES if options.kv_bytes is None else options.kv_bytes
    kv_num_bytes = _num_bytes("--kv-bytes", kv_bytes)
    asked = _num_bytes("--store-bytes", options.store_size) * options.num_kvstore
    if options.device != "cpu":
        return  # whose memory it is the services know
    asked += kv_num_bytes * num_workers
    words = (
        f"--kv-bytes {kv_bytes} x {num_workers} (workers) + "
        f"--store-bytes {options.store_size} x {options.num_kvstore} (kvstores)"
    )
    limit = memory_num_bytes()
    if asked > limit:
        raise PlanError(f"{words} = {asked} bytes; this machine has {limit} bytes of memory")


def _check_host(options: MeshOptions) -> None:
    """Host memory is another place than the stores' own, and this machine has it."""
    if options.store_host is None:
        return
    num_bytes, limit = _num_bytes("--store-host", options.store_host), memory_num_bytes()
    words = f"--store-host {options.store_host}"
    if options.device != "cuda":
        raise PlanError(
            f"{words}: needs --device cuda; on {options.device} stores are in host memory anyway "
            "(--store-bytes)"
        )
    asked = num_bytes * options.num_kvstore
    if asked > limit:
        words += f" x {options.num_kvstore} (kvstores)"
        raise PlanError(f"{words} = {asked} bytes; this machine has {limit} bytes of memory")


def _check_disk(options: MeshOptions) -> None:
    """The stores can have a directory each below the one that is given."""
    _num_bytes("--store-disk-bytes", options.store_disk_bytes)
    directory = options.store_disk
    if directory is None:
        return
    if directory.exists() and not directory.is_dir():
        raise PlanError(f"--store-disk {directory}: not a directory")


def _num_bytes(flag: str, text: str) -> int:
    try:
        num_bytes = parse_bytes(text)
    except ValueError as error:
        raise PlanError(f"{flag}: {error}") from None
    if num_bytes < 1:
        raise PlanError(f"{flag} {text}: give at least 1 byte")
    return num_bytes
