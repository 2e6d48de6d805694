"""Which path a worker takes to a store, with real probes of this machine's memory."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path

import pytest

from kv import path
from kv.path import KvPath, Transport, choose, one_sided
from kv.transfer import Agent

NAME = ctypes.create_string_buffer(b"kvstore-a")
STORE = Agent(
    name="kvstore-a",
    nixl_version="1",
    metadata=b"",
    arena_address=0,
    arena_num_bytes=1,
    incarnation="a",
    host_id="here",
    pid=os.getpid(),
    name_address=ctypes.addressof(NAME),
)
CMA, CUDA_IPC, RDMA = (Transport.CMA,), (Transport.CUDA_IPC,), (Transport.CMA, Transport.RDMA)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        pytest.param({"transports": CMA}, {"transports": CMA}, KvPath.READ, id="shared memory"),
        pytest.param({"transports": CMA}, {}, KvPath.WRITE, id="one of them may not use it"),
        pytest.param({}, {}, KvPath.WRITE, id="TCP only"),
        pytest.param(
            {"transports": CMA},
            {"transports": CMA, "pid": 2**22 + 1},
            KvPath.WRITE,
            id="no process",
        ),
        pytest.param(
            {"transports": CMA},
            {"transports": CMA, "name": "kvstore-b"},
            KvPath.WRITE,
            id="another process at that id",
        ),
        pytest.param(
            {"transports": CMA},
            {"transports": CMA, "name_address": 8},
            KvPath.WRITE,
            id="memory that cannot be read",
        ),
        pytest.param(
            {"transports": RDMA}, {"transports": RDMA, "pid": 0}, KvPath.READ, id="RDMA on both"
        ),
        pytest.param(
            {"transports": CUDA_IPC}, {"transports": CUDA_IPC}, KvPath.READ, id="GPUs of one host"
        ),
        pytest.param(
            {"transports": CUDA_IPC, "host_id": "there"},
            {"transports": CUDA_IPC},
            KvPath.WRITE,
            id="GPUs of two hosts",
        ),
        pytest.param(
            {"transports": CUDA_IPC}, {"transports": CMA}, KvPath.WRITE, id="GPU and DRAM"
        ),
    ],
)
def test_a_worker_reads_where_that_is_one_sided(
    ours: dict[str, object], theirs: dict[str, object], expected: KvPath
) -> None:
    worker = dataclasses.replace(STORE, name="decode", pid=1, **ours)  # pyright: ignore[reportArgumentType]
    store = dataclasses.replace(STORE, **theirs)  # pyright: ignore[reportArgumentType]
    assert choose("auto", worker, store) is expected
    assert {choose(wanted, worker, store) for wanted in KvPath} == set(KvPath)


@pytest.mark.parametrize(
    ("tls", "in_dram", "on_gpu"),
    [
        ("all", RDMA, (*CUDA_IPC, Transport.RDMA)),
        ("tcp", (), ()),
        ("tcp,cuda_copy", (), ()),
        ("self, sm ,tcp", CMA, ()),
        ("shm,cuda", CMA, CUDA_IPC),
        ("^tcp", RDMA, (*CUDA_IPC, Transport.RDMA)),
        ("^sm,cuda_ipc", (Transport.RDMA,), (Transport.RDMA,)),
        (r"cma,\rc", RDMA, (Transport.RDMA,)),
        ("^ib", CMA, CUDA_IPC),
    ],
)
def test_a_process_has_what_ucx_may_use(
    tls: str,
    in_dram: tuple[Transport, ...],
    on_gpu: tuple[Transport, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "uverbs0").touch()
    monkeypatch.setattr(path, "RDMA_DEVICES", tmp_path)
    assert one_sided(tls, is_on_gpu=False) == in_dram
    assert one_sided(tls, is_on_gpu=True) == on_gpu


def test_without_a_device_there_is_no_rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "RDMA_DEVICES", tmp_path / "infiniband")
    assert one_sided("all", is_on_gpu=False) == CMA
