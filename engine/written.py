"""Which step's KV is in the cache already, told by the device before the step is over.

Owns one number on the device and its copy on the host: the last layer's KV is there a while before
the step's tokens are, and who sends blocks away need not wait for those. Never waits for the device
except in `wait`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

_POLL_S = 0.0002


class WrittenMark:
    """Numbers of steps, as the device comes to the end of their KV.

    `begin` before each pass, `enqueue` among its kernels, behind the last that writes KV: captured
    in a graph or not. Works in the order of one stream.
    """

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._present = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=is_cuda)
        self._host = self._seen.numpy()
        self._num_steps = 0
        self._never = threading.Event()

    def next_step(self) -> int:
        """The number of the step that is launched now."""
        self._num_steps += 1
        return self._num_steps

    def begin(self, number: int, *, is_last: bool) -> None:
        """Enqueues what the pass behind it reports: the step before, unless it is its last pass."""
        self._present.fill_(number if is_last else number - 1)

    def enqueue(self) -> None:
        """Enqueues the report of a pass."""
        self._seen.copy_(self._present, non_blocking=True)

    def has(self, number: int) -> bool:
        """Whether the KV of that step, and of all before it, is in the cache."""
        return int(self._host[0]) >= number

    def wait(self, number: int, is_over: Callable[[], bool]) -> bool:
        """Polls until the KV of that step is there; False if the step is over without a report.

        is_over raises what the device raised.
        """
        while not self.has(number):
            if is_over():
                return self.has(number)
            self._never.wait(_POLL_S)
        return True
