"""The kvstore process: no torch, starts, tells its status, drains, exits 0."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import grpc
import pytest

from mesh.process import StartupError
from protos import kvstore_pb2, kvstore_pb2_grpc, status_pb2, status_pb2_grpc
from services.kvstore.__main__ import KvStore
from services.kvstore.disk_files import DiskFiles
from services.kvstore.settings import KvStoreSettings

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


def refusal(kv_bytes: str, *flags: str) -> str:
    """What a store that cannot start prints."""
    command = [sys.executable, "-m", "services.kvstore", "--kv-bytes", kv_bytes, *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode in (1, 2)
    return result.stderr


def test_a_bad_size_is_named() -> None:
    errors = refusal("many")
    assert "--kv-bytes: 'many'" in errors and "Traceback" not in errors
    errors = refusal("1MiB", "--tenant-bytes", "few")
    assert "--tenant-bytes: 'few'" in errors and "Traceback" not in errors
    assert "--max-pinned" in refusal("1MiB", "--max-pinned", "1.5")


def test_a_disk_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    assert f"--disk-dir {path}: " in refusal("1MiB", "--disk-dir", str(path))
    bad = refusal("1MiB", "--disk-dir", str(tmp_path), "--disk-bytes", "much")
    assert "--disk-bytes: 'much'" in bad and "Traceback" not in bad


def test_host_memory_beside_dram_is_refused() -> None:
    errors = refusal("1MiB", "--host-bytes", "1MiB")
    assert "--host-bytes 1MiB: needs --device cuda" in errors and "Traceback" not in errors
    assert "--host-bytes: 'much'" in refusal("1MiB", "--host-bytes", "much")


def test_a_directory_in_use_is_named(tmp_path: Path) -> None:
    files = DiskFiles(tmp_path)
    assert "another kvstore uses this directory" in refusal("1MiB", "--disk-dir", str(tmp_path))
    files.close()


@pytest.mark.parametrize("kv_bytes", ["999TiB", "9999TB"])
def test_more_memory_than_the_machine_has_is_named(kv_bytes: str) -> None:
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    errors = refusal(kv_bytes)
    assert f"--kv-bytes {kv_bytes}: " in errors, errors
    assert errors.endswith(f"this machine has {limit} bytes of memory\n")


def test_memory_that_cannot_be_mapped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("services.kvstore.arena.mmap.mmap", refuse)
    with pytest.raises(StartupError, match=r"--kv-bytes 1MiB: .*Cannot allocate.*this machine has"):
        KvStore(KvStoreSettings(kv_bytes="1MiB"))


def refused(
    store: kvstore_pb2_grpc.KvStoreServiceStub, request: kvstore_pb2.ReserveRequest
) -> grpc.StatusCode:
    """The code with which a Reserve is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        store.Reserve(request, timeout=10)
    return caught.value.code()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_store_too_small_for_a_block_says_so_once() -> None:
    command = [sys.executable, "-m", "services.kvstore", "--kv-bytes", "1KiB"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[2].removeprefix("address=")
        with grpc.insecure_channel(address) as channel:
            store = kvstore_pb2_grpc.KvStoreServiceStub(channel)
            stranger = kvstore_pb2.ReserveRequest(keys=[b"k" * 32], num_bytes=2**60, ttl_s=1)
            assert refused(store, stranger) is grpc.StatusCode.FAILED_PRECONDITION
            agent = kvstore_pb2.Agent(name="w", nixl_version=version("nixl-cu13"), incarnation="w")
            store.Connect(kvstore_pb2.ConnectRequest(agent=agent), timeout=10)
            request = kvstore_pb2.ReserveRequest(
                keys=[b"k" * 32], num_bytes=32768, ttl_s=1, incarnation="w"
            )
            for _ in range(2):
                assert refused(store, request) is grpc.StatusCode.INVALID_ARGUMENT
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=15)[1]
    finally:
        process.kill()
        process.communicate()
    warnings = [line for line in errors.splitlines() if "WARNING" in line]
    assert len(warnings) == 1, errors
    assert "--kv-bytes 1024 is less than one block of 32768 bytes" in warnings[0]


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
            assert not instance.counts.num_pins
            watch = store.Watch(kvstore_pb2.WatchRequest(), timeout=20)
            assert next(watch).life.startswith("kvstore-")
            process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as ended:
                list(watch)
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE  # pyright: ignore[reportAttributeAccessIssue]
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
