"""Files of blocks: whole ones come back; others are told apart before a byte of them is used."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kv.digest import block_digest
from services.kvstore.copies import UnusableBlock
from services.kvstore.disk_files import DiskFiles
from services.kvstore.disk_format import HEADER_NUM_BYTES, BadHeader, Header

PAGE = 4096
KEY = bytes(range(32))


def block(num_bytes: int = 2 * PAGE, seed: int = 0) -> memoryview:
    """Random bytes, aligned to pages as slots of whole pages are."""
    data = memoryview(mmap.mmap(-1, num_bytes))
    data[:] = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8).tobytes()
    return data


def header_of(data: memoryview, key: bytes = KEY) -> Header:
    return Header(key=key, num_bytes=data.nbytes, digest=block_digest(data))


@pytest.fixture
def files(tmp_path: Path) -> DiskFiles:
    return DiskFiles(tmp_path / "disk")


def path_of(files: DiskFiles, key: bytes = KEY) -> Path:
    return files.directory / f"{key.hex()}.kv"


def put(files: DiskFiles, key: bytes = KEY) -> tuple[Header, memoryview]:
    data = block(seed=key[0])
    header = header_of(data, key)
    files.write(header, data)
    return header, data


@pytest.mark.parametrize("num_bytes", [8, 1000, PAGE, 2 * PAGE, 5 * PAGE + 64, 3 * 2**20])
def test_a_block_comes_back(files: DiskFiles, num_bytes: int) -> None:
    data, back = block(num_bytes), memoryview(mmap.mmap(-1, num_bytes))
    files.write(header_of(data), data)
    files.read(header_of(data), back)
    assert back == data
    assert path_of(files).stat().st_size == HEADER_NUM_BYTES + num_bytes


def test_memory_that_is_not_aligned_will_do(files: DiskFiles) -> None:
    room = block(3 * PAGE)
    data, back = room[64 : 64 + PAGE], memoryview(bytearray(PAGE + 8))[8:]
    files.write(header_of(data), data)
    files.read(header_of(data), back)
    assert back == data


def test_writing_again_replaces(files: DiskFiles) -> None:
    put(files)
    longer = block(4 * PAGE, seed=9)
    files.write(header_of(longer), longer)
    back = block(4 * PAGE)
    files.read(header_of(longer), back)
    assert back == longer


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("disk_read", lambda path: path.unlink()),
    ("disk_read", lambda path: os.truncate(path, HEADER_NUM_BYTES + 100)),
    ("disk_read", lambda path: os.truncate(path, 10)),
    ("disk_read", lambda path: path.unlink() or path.mkdir()),
    ("disk_header", lambda path: flip(path, 3)),
    ("disk_header", lambda path: flip(path, 20)),
    ("disk_header", lambda path: flip(path, HEADER_NUM_BYTES - 1)),
    ("disk_digest", lambda path: flip(path, HEADER_NUM_BYTES)),
    ("disk_digest", lambda path: flip(path, HEADER_NUM_BYTES + 2 * PAGE - 1)),
]


@pytest.mark.parametrize(("reason", "damage"), DAMAGES)
def test_a_damaged_file_is_never_read_as_a_block(
    files: DiskFiles, reason: str, damage: Callable[[Path], object]
) -> None:
    header, data = put(files)
    damage(path_of(files))
    with pytest.raises(UnusableBlock) as caught:
        files.read(header, block(data.nbytes))
    assert caught.value.reason == reason


def test_a_block_of_another_digest_is_refused(files: DiskFiles) -> None:
    header, data = put(files)
    with pytest.raises(UnusableBlock, match="header is not the block's"):
        files.read(Header(key=KEY, num_bytes=header.num_bytes, digest=1), block(data.nbytes))


def test_a_file_that_does_not_fit_leaves_nothing_behind(files: DiskFiles) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    data = block(64 * PAGE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * PAGE, limits[1]))
    try:
        with pytest.raises(OSError, match=r"\d+ of \d+ bytes|File too large"):
            files.write(header_of(data), data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path_of(files).exists()


def test_a_scan_finds_whole_blocks_in_the_order_of_use(files: DiskFiles) -> None:
    headers = [put(files, bytes([n]) * 32)[0] for n in range(3)]
    for age, header in enumerate(headers):
        os.utime(path_of(files, header.key), (0, 1000 - age))
    files.read(headers[2], block())  # used now
    found = files.scan()
    assert found.headers == [headers[1], headers[0], headers[2]]
    assert (found.num_dropped, found.num_foreign) == (0, 0)


def other_version(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(data)


TORN: list[Callable[[Path], object]] = [
    lambda path: os.truncate(path, 0),
    lambda path: os.truncate(path, 100),
    lambda path: os.truncate(path, HEADER_NUM_BYTES + PAGE),
    lambda path: os.truncate(path, HEADER_NUM_BYTES + 3 * PAGE),
    lambda path: path.write_bytes(b"x" * (HEADER_NUM_BYTES + 2 * PAGE)),
    lambda path: flip(path, 30),
    lambda path: path.rename(path.with_name("0" * 64 + ".kv")),
    other_version,
]


@pytest.mark.parametrize("damage", TORN)
def test_a_scan_removes_what_is_no_whole_block(
    files: DiskFiles, damage: Callable[[Path], object]
) -> None:
    put(files)
    kept, _ = put(files, b"k" * 32)
    damage(path_of(files))
    found = files.scan()
    assert (found.headers, found.num_dropped) == ([kept], 1)
    assert {path.name for path in files.directory.iterdir()} == {
        path_of(files, kept.key).name,
        "kvmesh.lock",
    }


def test_a_scan_leaves_files_of_others_alone(files: DiskFiles) -> None:
    elsewhere = files.directory.parent / "precious"
    elsewhere.write_text("x")
    (files.directory / "notes.txt").write_text("x")
    (files.directory / f"{'b' * 64}.kv").symlink_to(elsewhere)
    (files.directory / f"{'c' * 64}.kv").mkdir()
    found = files.scan()
    assert (found.headers, found.num_dropped, found.num_foreign) == ([], 0, 3)
    assert elsewhere.exists() and (files.directory / "notes.txt").exists()


def test_two_stores_never_share_a_directory(files: DiskFiles) -> None:
    with pytest.raises(OSError, match="another kvstore uses this directory"):
        DiskFiles(files.directory)
    files.close()
    DiskFiles(files.directory).close()


def test_a_file_system_without_direct_io_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def refuse(path: object, flags: int, *rest: object, **options: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("os.open", refuse)
    files = DiskFiles(tmp_path)
    header, data = put(files)
    files.read(header, back := block(data.nbytes))
    assert back == data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes; a header has 4096"),
        (b"x" * 4096, "not a block's file"),
        (Header(key=KEY, num_bytes=8, digest=1).encode()[:-1] + b"x", "checksum"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(data: bytes, words: str) -> None:
    with pytest.raises(BadHeader, match=words):
        Header.decode(data)
