"""Copies of blocks in files, for an arena in DRAM or in a GPU's memory.

Owns the way between a slot and a file: none in DRAM; for a GPU through a buffer a thread. Digests
are verified in host memory, before a slot gets the bytes.
"""

from __future__ import annotations

import errno
import logging
import mmap
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.kvstore.copies import CopyEngine, CopyFailed, Span, UnusableBlock
from services.kvstore.disk_files import DiskFiles
from services.kvstore.lower_tier import Move

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
log = logging.getLogger("kvmesh.kvstore")


class Window(Protocol):
    """Host memory through which files see slots; what it hands out is the calling thread's."""

    def loaded(self, offset: int, num_bytes: int) -> memoryview:
        """Bytes of a slot."""
        ...

    def blank(self, offset: int, num_bytes: int) -> memoryview:
        """Memory to fill, for a slot."""
        ...

    def store(self, offset: int, data: memoryview) -> None:
        """Brings what was filled into the slot."""
        ...

    def close(self) -> None:
        """Lets go of everything; no thread calls any more."""
        ...


class DirectWindow:
    """The slots themselves, in DRAM."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memoryview(memory)  # pyright: ignore[reportArgumentType]

    def loaded(self, offset: int, num_bytes: int) -> memoryview:
        """The slot."""
        return self._memory[offset : offset + num_bytes]

    def blank(self, offset: int, num_bytes: int) -> memoryview:
        """The slot."""
        return self.loaded(offset, num_bytes)

    def store(self, offset: int, data: memoryview) -> None:
        """Nothing: it is there."""

    def close(self) -> None:
        """Nothing: the memory is another's."""


class BounceWindow:
    """A buffer for each thread, as large as the largest block that it has seen.

    Pinned where the driver pins it: copies are only slower otherwise.
    """

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self._own = threading.local()
        self._pinned: list[NDArray[np.uint8]] = []

    def loaded(self, offset: int, num_bytes: int) -> memoryview:
        """A copy of the slot."""
        memory = self._buffer(num_bytes)
        self._engine.read([Span(offset, int(memory.ctypes.data), num_bytes)])
        return memoryview(memory)[:num_bytes]  # pyright: ignore[reportArgumentType]

    def blank(self, offset: int, num_bytes: int) -> memoryview:
        """The buffer."""
        return memoryview(self._buffer(num_bytes))[:num_bytes]  # pyright: ignore[reportArgumentType]

    def store(self, offset: int, data: memoryview) -> None:
        """Copies it to the slot."""
        address = int(np.frombuffer(data, dtype=np.uint8).ctypes.data)
        self._engine.write([Span(offset, address, data.nbytes)])

    def close(self) -> None:
        """Unpins the buffers."""
        for memory in self._pinned:
            self._engine.unpin(memory)
        self._pinned.clear()

    def _buffer(self, num_bytes: int) -> NDArray[np.uint8]:
        memory: NDArray[np.uint8] | None = getattr(self._own, "memory", None)
        if memory is not None and len(memory) >= num_bytes:
            return memory
        pages = -(-num_bytes // mmap.PAGESIZE)
        mapping = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = self._own.memory = np.frombuffer(mapping, dtype=np.uint8)
        try:
            self._engine.pin(memory)
            self._pinned.append(memory)
        except RuntimeError as error:
            log.warning("blocks on disk move slowly, their buffer cannot be pinned: %s", error)
        return memory


class DiskCopies:
    """Files of one directory, and the window through which they see slots."""

    def __init__(self, files: DiskFiles, window: Window) -> None:
        self._files = files
        self._window = window

    def read(self, moves: Sequence[Move]) -> None:
        """Fills slots with what was sealed; a slot gets no bytes of a wrong digest."""
        for move in moves:
            data = self._window.blank(move.offset, move.header.num_bytes)
            self._files.read(move.header, data)
            try:
                self._window.store(move.offset, data)
            except RuntimeError as error:
                raise UnusableBlock(self._files.directory, "disk_copy", str(error)) from error

    def write(self, moves: Sequence[Move]) -> None:
        """Writes files."""
        for move in moves:
            try:
                data = self._window.loaded(move.offset, move.header.num_bytes)
                self._files.write(move.header, data)
            except OSError as error:
                reason = "disk_full" if error.errno in _DISK_FULL else "disk_write"
                raise CopyFailed(self._files.directory, reason, str(error)) from error
            except RuntimeError as error:
                raise CopyFailed(self._files.directory, "disk_copy", str(error)) from error

    def remove(self, key: bytes) -> None:
        """Removes a file."""
        self._files.remove(key)

    def close(self) -> None:
        """Lets another store use the directory."""
        self._window.close()
        self._files.close()
