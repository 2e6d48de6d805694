"""The CPU's twin of CudaEngine: one mapping stands for a GPU's memory, another for pinned DRAM."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.kvstore.arena import DramArena
from services.kvstore.copies import Span

PATIENCE_S = 20.0


class PlainEngine:
    """Copies wait at a gate that tests may shut; `error` fails them."""

    def __init__(self, arena: DramArena) -> None:
        self._arena = arena
        self.gate = threading.Event()
        self.gate.set()
        self.error: RuntimeError | None = None
        self.pin_error: RuntimeError | None = None
        self.pinned: set[int] = set()
        self.num_writes = self.num_spans = 0  # calls, and what the last one copied

    def read(self, spans: Sequence[Span]) -> None:
        self._begin(spans)
        for offset, address, num_bytes in spans:
            ctypes.memmove(address, self._arena.address + offset, num_bytes)

    def write(self, spans: Sequence[Span]) -> None:
        self.num_writes += 1
        self.num_spans = len(spans)
        self._begin(spans)
        for offset, address, num_bytes in spans:
            ctypes.memmove(self._arena.address + offset, address, num_bytes)

    def pin(self, memory: NDArray[np.uint8]) -> None:
        if self.pin_error is not None:
            raise self.pin_error
        self.pinned.add(int(memory.ctypes.data))

    def unpin(self, memory: NDArray[np.uint8]) -> None:
        self.pinned.remove(int(memory.ctypes.data))

    def _begin(self, spans: Sequence[Span]) -> None:
        assert self.gate.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        for offset, _, num_bytes in spans:
            assert 0 <= offset <= self._arena.num_bytes - num_bytes, "a copy outside the arena"
