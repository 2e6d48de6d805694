"""The store's GPU memory: one plain device allocation, as DramArena is for DRAM.

Owns the allocation and the process's CUDA context. Never reads or writes the bytes.
"""

from __future__ import annotations

import ctypes

from services.kvstore.cuda_driver import CudaDriver


class HbmArena:
    """num_bytes of one GPU's memory. `close` frees it.

    MemoryError when the GPU has not that much; RuntimeError without a driver or such a GPU.
    """

    tier = "hbm"

    def __init__(self, num_bytes: int, device_id: int = 0) -> None:
        if num_bytes <= 0:
            raise ValueError(f"arena of {num_bytes} bytes; at least 1 is needed")
        self.num_bytes, self.device_id = num_bytes, device_id
        self.driver = CudaDriver()
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self.driver.call("cuDeviceGet", ctypes.byref(device), device_id)
        self._device = device
        self.driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.make_current()
        address = ctypes.c_uint64()
        try:
            self.driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        except RuntimeError as error:
            free, total = self._memory()
            self.driver.call("cuDevicePrimaryCtxRelease_v2", self._device)
            raise MemoryError(
                f"arena of {num_bytes} bytes on GPU {device_id}, which has {free} bytes free of "
                f"{total}: {error}"
            ) from error
        self.address = address.value

    def make_current(self) -> None:
        """Lets the calling thread use the GPU; every thread that touches it must call this."""
        self.driver.call("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        """Frees the memory; nobody may still move bytes."""
        if self.address:
            self.make_current()
            self.driver.call("cuMemFree_v2", ctypes.c_uint64(self.address))
            self.driver.call("cuDevicePrimaryCtxRelease_v2", self._device)
            self.address = 0

    def _memory(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value
