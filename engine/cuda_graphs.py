"""CUDA graphs of decode steps, one per batch size.

Owns the sizes, the capture, and the memory that graphs share. Never decides what runs.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable

import torch

_SMALL = (1, 2, 4)
_FINE, _COARSE = 8, 32
_LARGE = 256


def bucket_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, multiples of 8 up to 256 and of 32 above, to the first that holds max_batch."""
    sizes = [*_SMALL, *range(_FINE, _LARGE, _FINE), *range(_LARGE, max_batch + _COARSE, _COARSE)]
    return sizes[: bisect.bisect_left(sizes, max_batch) + 1]


class GraphBuckets:
    """Captured steps by number of rows; a step runs in the smallest that holds it.

    enqueue(num_rows) enqueues a whole step over tensors that stay where they are; it must not
    synchronise. It runs once before each capture, so that everything is compiled.
    """

    def __init__(
        self,
        sizes: list[int],
        enqueue: Callable[[int], None],
        device: torch.device,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._sizes = sorted(sizes)
        self._enqueue = enqueue
        self._device = device
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            self._capture(progress)

    @property
    def largest(self) -> int:
        """Rows of the largest step."""
        return self._sizes[-1]

    def size_for(self, num_rows: int) -> int:
        """The smallest captured size that holds num_rows."""
        return self._sizes[bisect.bisect_left(self._sizes, num_rows)]

    def replay(self, size: int) -> None:
        """Enqueues the step of a captured size on the current stream; on a CPU, computes it."""
        if self._graphs:
            self._graphs[size].replay()
        else:
            self._enqueue(size)

    def _capture(self, progress: Callable[[str], None]) -> None:
        """Largest first: the others find their memory in the pool already."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        pool = None
        gc.collect()
        gc.disable()  # a tensor freed by the collector amid a capture would break it
        try:
            for done, size in enumerate(reversed(self._sizes), 1):
                with torch.cuda.stream(stream):
                    self._enqueue(size)
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    self._enqueue(size)
                pool = pool or graph.pool()
                self._graphs[size] = graph
                if done % 8 == 0 or done == len(self._sizes):
                    progress(f"capturing decode steps: {done} of {len(self._sizes)} batch sizes")
        finally:
            gc.enable()
        torch.cuda.current_stream(self._device).wait_stream(stream)
