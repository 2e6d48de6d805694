"""The store's pinned host memory, for copies of blocks whose arena is a GPU's.

Owns one allocation. Never reads or writes the bytes.
"""

from __future__ import annotations

import ctypes

from services.kvstore.hbm import HbmArena

_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE


class PinnedMemory:
    """num_bytes of DRAM that one GPU copies from and to at full speed. `close` frees it.

    All of it is taken at once. RuntimeError when the driver cannot have it.
    """

    def __init__(self, arena: HbmArena, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._arena = arena
        arena.make_current()
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(num_bytes)
        arena.driver.call("cuMemHostAlloc", ctypes.byref(address), size, ctypes.c_uint(_PORTABLE))
        assert address.value is not None
        self.address = address.value

    def close(self) -> None:
        """Frees the memory, before its arena; nobody may still move bytes."""
        if self.address:
            self._arena.make_current()
            self._arena.driver.call("cuMemFreeHost", ctypes.c_void_p(self.address))
            self.address = 0
