"""How a worker's flags become a runner and the fingerprint of its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runner import ModelRunner
from engine.runners import RunnerOptions
from services import worker_model
from services.worker_model import fingerprint_of, load_model
from services.worker_settings import WorkerSettings
from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_tiny_model("qwen3", path)
    return path


@pytest.fixture(scope="module")
def bare(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a file of weights."""
    path = tmp_path_factory.mktemp("bare")
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    return path


def fingerprint(path: Path, load_format: str, **flags: Any) -> bytes:
    settings = WorkerSettings(
        model=path, load_format=load_format, **{"kv_bytes": "1MiB", "block_tokens": 16, **flags}
    )
    runner = load_model(settings, lambda line: None)
    assert isinstance(runner, ModelRunner)
    return fingerprint_of(settings, runner)


def test_every_option_is_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(worker_model, "load_runner", lambda model, **rest: seen.update(rest))
    settings = WorkerSettings(
        dtype="bf16",
        kv_dtype="fp8",
        load_format="dummy",
        block_tokens=32,
        kv_bytes="3KiB",
        gpu_memory_fraction=0.25,
        max_batch=5,
        chunk_tokens=77,
        rmsnorm_warps=8,
        moe_align="kvmesh",
    )
    load_model(settings, print)
    assert seen["device"] == "cpu"
    assert seen["options"] == RunnerOptions(
        dtype="bf16",
        kv_dtype="fp8",
        load_format="dummy",
        block_tokens=32,
        kv_bytes=3072,
        memory_fraction=0.25,
        max_batch=5,
        chunk_tokens=77,
        rmsnorm_warps=8,
        moe_align="kvmesh",
    )


def test_kv_takes_what_a_gpu_has_left_and_little_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int | None] = []
    monkeypatch.setattr(
        worker_model, "load_runner", lambda model, **rest: seen.append(rest["options"].kv_bytes)
    )
    for device in ("cpu", "cuda"):
        load_model(WorkerSettings(device=device), print)
    assert seen == [256 * 2**20, None]


def test_workers_that_make_the_same_weights_have_one_fingerprint(
    checkpoint: Path, bare: Path
) -> None:
    prefill = fingerprint(bare, "dummy")
    assert prefill == fingerprint(bare, "dummy", kv_bytes="2MiB", max_batch=3, num_threads=2)
    assert prefill == fingerprint(checkpoint, "dummy")


def test_dummy_weights_never_meet_a_checkpoint_nor_others_of_their_kind(
    checkpoint: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = [
        fingerprint(checkpoint, "auto"),
        fingerprint(bare, "dummy"),
        fingerprint(bare, "dummy", dtype="bf16"),
        fingerprint(bare, "dummy", dtype="fp8"),
        fingerprint(bare, "dummy", kv_dtype="fp8"),
        fingerprint(bare, "dummy", block_tokens=32),
    ]
    monkeypatch.setattr(worker_model, "dummy_weights_id", lambda device: "another seed")
    prints.append(fingerprint(bare, "dummy"))
    assert len(set(prints)) == len(prints)


def test_a_missing_file_of_weights_is_named(bare: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors does not exist"):
        fingerprint(bare, "auto")


def test_the_name_of_dummy_weights_is_asked_for_the_workers_device(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.device] = []
    monkeypatch.setattr(worker_model, "dummy_weights_id", lambda d: seen.append(d) or "")
    fingerprint(bare, "dummy")
    assert seen == [torch.device("cpu")]
