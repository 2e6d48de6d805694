"""The kvstore process: no torch, starts, tells its status, drains, exits 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc

from protos import kvstore_pb2, kvstore_pb2_grpc, status_pb2, status_pb2_grpc

ROOT = Path(__file__).resolve().parents[3]
_FORBIDDEN = "('torch', 'triton', 'transformers', 'engine', 'kernels')"


def test_the_process_never_imports_tensors() -> None:
    code = (
        "import sys, services.kvstore.__main__; "
        f"print([m for m in {_FORBIDDEN} if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_a_bad_size_is_named() -> None:
    command = [sys.executable, "-m", "services.kvstore", "--kv-bytes", "many"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0 and "--kv-bytes: 'many'" in result.stderr
    assert "Traceback" not in result.stderr


def test_it_serves_and_drains() -> None:
    command = [sys.executable, "-m", "services.kvstore", "--kv-bytes", "1GiB"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:2] == ["kvmesh-ready", "role=kvstore"], words
        with grpc.insecure_channel(words[2].removeprefix("address=")) as channel:
            status = status_pb2_grpc.StatusServiceStub(channel)
            (instance,) = status.GetStatus(status_pb2.GetStatusRequest(), timeout=10).instances
            assert instance.ready and instance.role == status_pb2.ROLE_KVSTORE
            assert instance.counts.rss_num_bytes < 2**29, "the arena was touched at start"
            store = kvstore_pb2_grpc.KvStoreServiceStub(channel)
            ours = kvstore_pb2.Agent(name="w", nixl_version="0.0", incarnation="w")
            try:
                store.Connect(kvstore_pb2.ConnectRequest(agent=ours), timeout=10)
                raise AssertionError("another NIXL version was accepted")
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
