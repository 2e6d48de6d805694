"""The files of the disk tier: one a block, named by its key, in one directory of this store's own.

Owns every system call on them; all of them block and belong into a thread. Never decides what is
kept, and never hands out bytes that it did not verify: a block read back has the digest that was
stored at Seal, or reading it raises. Files that are not the store's own are never touched.

Blocks of whole pages bypass the page cache (O_DIRECT) where the file system can: the store is the
cache, and bytes cached twice would cost memory that nobody has budgeted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kv.digest import block_digest
from services.kvstore.copies import UnusableBlock
from services.kvstore.disk_format import HEADER_NUM_BYTES, BadHeader, Header

_NAME = re.compile(r"[0-9a-f]{64}\.kv", re.ASCII)
_LOCK = "kvmesh.lock"
_PAGE = HEADER_NUM_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a directory held at start: blocks, least recently used first, and what was dropped."""

    headers: list[Header]
    num_dropped: int  # files of ours that hold no whole block; they are gone
    num_foreign: int  # others, left alone


class DiskFiles:
    """One directory, locked for this process until `close`. OSError when it cannot be used."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._direct = _direct_flag(directory)
        except OSError as error:
            os.close(self._lock)
            if error.errno == errno.EWOULDBLOCK:
                raise OSError(error.errno, "another kvstore uses this directory") from error
            raise

    def close(self) -> None:
        """Lets another store use the directory."""
        os.close(self._lock)

    def scan(self) -> Found:
        """Reads every header; removes files of ours that are torn, cut off or unknown."""
        found: list[tuple[int, Header]] = []
        num_dropped = num_foreign = 0
        for entry in os.scandir(self.directory):
            if entry.name == _LOCK:
                continue
            if not _NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                num_foreign += 1
                continue
            try:
                found.append((entry.stat().st_mtime_ns, _read_header(Path(entry.path))))
            except (OSError, BadHeader):
                num_dropped += 1
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
        found.sort(key=lambda pair: pair[0])
        headers = [header for _, header in found]
        return Found(headers=headers, num_dropped=num_dropped, num_foreign=num_foreign)

    def write(self, header: Header, data: memoryview) -> None:
        """Writes a block's file, replacing any of that name. After an OSError there is none."""
        path = self._path(header.key)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | self._flag(data)
        with _header_page() as page:
            page[:] = header.encode()
            try:
                with _opened(path, flags) as file:
                    _whole(os.pwritev(file, [page, data], 0), len(page) + data.nbytes)
                    _mark_used(file)
            except OSError:
                self.remove(header.key)
                raise

    def read(self, header: Header, data: memoryview) -> None:
        """Fills `data` with a block's bytes, verified. UnusableBlock; `data` is then undefined."""
        path = self._path(header.key)
        flags = os.O_RDONLY | os.O_CLOEXEC | self._flag(data)
        with _header_page() as page:
            try:
                with _opened(path, flags) as file:
                    _whole(os.preadv(file, [page, data], 0), len(page) + data.nbytes)
                    _mark_used(file)
            except OSError as error:
                raise UnusableBlock(path, "disk_read", str(error)) from error
            if page[:] != header.encode():
                raise UnusableBlock(path, "disk_header", "the header is not the block's")
        if block_digest(data) != header.digest:
            raise UnusableBlock(path, "disk_digest", "the bytes are not those that were sealed")

    def remove(self, key: bytes) -> None:
        """Removes a block's file; one that cannot be removed is dropped or found again at start."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(key))

    def _path(self, key: bytes) -> Path:
        return self.directory / f"{key.hex()}.kv"

    def _flag(self, data: memoryview) -> int:
        """O_DIRECT where memory and length are aligned for it."""
        address = _address(data)
        return self._direct if address % _PAGE == data.nbytes % _PAGE == 0 else 0


def _read_header(path: Path) -> Header:
    """The header of a whole file that has its block's name; BadHeader, OSError."""
    with _opened(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW) as file:
        header = Header.decode(os.pread(file, HEADER_NUM_BYTES, 0))
        num_bytes = os.fstat(file).st_size
    if num_bytes != HEADER_NUM_BYTES + header.num_bytes:
        raise BadHeader(f"a file of {num_bytes} bytes for a block of {header.num_bytes}")
    if path.stem != header.key.hex():
        raise BadHeader("the block of another name")
    return header


def _direct_flag(directory: Path) -> int:
    """O_DIRECT, or 0 where the file system does not know it."""
    try:
        os.close(os.open(directory / _LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0
    return os.O_DIRECT


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags, 0o600)
    try:
        yield file
    finally:
        os.close(file)


def _mark_used(file: int) -> None:
    """The store's next life reads the order of use from this; the kernel's own time is coarser."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _header_page() -> mmap.mmap:
    """Memory for a header, aligned to pages."""
    return mmap.mmap(-1, HEADER_NUM_BYTES)


def _address(data: memoryview) -> int:
    return np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0]


def _whole(num_bytes: int, expected: int) -> None:
    if num_bytes != expected:
        raise OSError(errno.EIO, f"{num_bytes} of {expected} bytes")
