"""The CUDA driver, through ctypes: the store never imports torch.

Owns how its functions are called and how they fail. Knows no arena and no block.
"""

from __future__ import annotations

import ctypes
from typing import Any


class CudaDriver:
    """libcuda of this machine. RuntimeError where there is none."""

    def __init__(self) -> None:
        try:
            self._library: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError(f"no CUDA driver: {error}") from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function by its name, other threads running meanwhile; RuntimeError."""
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


def device_name(driver: CudaDriver, device_id: int) -> str:
    """What a GPU calls itself."""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    driver.call("cuDeviceGet", ctypes.byref(device), device_id)
    driver.call("cuDeviceGetName", name, len(name), device)
    return name.value.decode()
