"""Copies between a GPU's memory and the host's, by the GPU's own copy engines.

Owns a stream for each thread that copies. A call queues all its copies, then sleeps until the last
has ended, so that the bus is busy while Python is not.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.kvstore.copies import Span
from services.kvstore.hbm import HbmArena

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: waits for no other stream
_SLEEPING = 1 | 2  # CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE


class CudaEngine:
    """A CopyEngine of one arena. `close` when no thread copies any more, before the arena's."""

    def __init__(self, arena: HbmArena) -> None:
        self._arena = arena
        self._driver = arena.driver
        self._own = threading.local()
        self._lock = threading.Lock()
        self._lanes: list[tuple[ctypes.c_void_p, ctypes.c_void_p]] = []

    def read(self, spans: Sequence[Span]) -> None:
        """From the GPU; returns when all have come."""
        stream, event = self._lane()
        try:
            for offset, address, num_bytes in spans:
                source, size = self._device(offset, num_bytes), ctypes.c_size_t(num_bytes)
                target = ctypes.c_void_p(address)
                self._driver.call("cuMemcpyDtoHAsync_v2", target, source, size, stream)
        finally:
            self._wait(stream, event)

    def write(self, spans: Sequence[Span]) -> None:
        """Into the GPU; returns when all have arrived."""
        stream, event = self._lane()
        try:
            for offset, address, num_bytes in spans:
                target, size = self._device(offset, num_bytes), ctypes.c_size_t(num_bytes)
                source = ctypes.c_void_p(address)
                self._driver.call("cuMemcpyHtoDAsync_v2", target, source, size, stream)
        finally:
            self._wait(stream, event)

    def pin(self, memory: NDArray[np.uint8]) -> None:
        """Locks pages for the GPU to copy from and to."""
        self._arena.make_current()
        size, flags = ctypes.c_size_t(memory.nbytes), ctypes.c_uint(_PORTABLE)
        self._driver.call("cuMemHostRegister_v2", _address(memory), size, flags)

    def unpin(self, memory: NDArray[np.uint8]) -> None:
        """Unlocks them."""
        self._arena.make_current()
        self._driver.call("cuMemHostUnregister", _address(memory))

    def close(self) -> None:
        """Ends the streams."""
        self._arena.make_current()
        for stream, event in self._lanes:
            self._driver.call("cuEventDestroy_v2", event)
            self._driver.call("cuStreamDestroy_v2", stream)
        self._lanes.clear()

    def _lane(self) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """The calling thread's stream, and the event that ends what it queued."""
        lane: tuple[ctypes.c_void_p, ctypes.c_void_p] | None = getattr(self._own, "lane", None)
        if lane is not None:
            return lane
        self._arena.make_current()
        stream, event = ctypes.c_void_p(), ctypes.c_void_p()
        self._driver.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self._driver.call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_SLEEPING))
        lane = self._own.lane = (stream, event)
        with self._lock:
            self._lanes.append(lane)
        return lane

    def _wait(self, stream: ctypes.c_void_p, event: ctypes.c_void_p) -> None:
        self._driver.call("cuEventRecord", event, stream)
        self._driver.call("cuEventSynchronize", event)

    def _device(self, offset: int, num_bytes: int) -> ctypes.c_uint64:
        assert 0 <= offset <= self._arena.num_bytes - num_bytes, "a copy outside the arena"
        return ctypes.c_uint64(self._arena.address + offset)


def _address(memory: NDArray[np.uint8]) -> ctypes.c_void_p:
    return ctypes.c_void_p(int(memory.ctypes.data))
