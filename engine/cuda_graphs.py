"""CUDA graphs by number of rows.

Owns the sizes of decode steps, the capture, and the memory that graphs share. Never decides what
runs.
"""

from __future__ import annotations

import bisect
import functools
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


class GraphPool:
    """Memory that graphs on one device share: they run one after the other on one stream, and
    nothing in it outlives the graph that wrote it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(
        self, enqueue: Callable[[], None], stream: torch.cuda.Stream
    ) -> torch.cuda.CUDAGraph:
        """What enqueue enqueues, captured; it runs once before, so that everything is compiled."""
        with torch.cuda.stream(stream):
            enqueue()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = None if self._graph is None else self._graph.pool()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            enqueue()
        self._graph = self._graph or graph
        return graph


class GraphBuckets:
    """Captured steps by number of rows; a step runs in the smallest that holds it.

    what: in the lines of progress; enqueue(num_rows) enqueues a whole step over tensors that stay
    where they are; it must not synchronise.
    """

    def __init__(
        self,
        what: str,
        sizes: list[int],
        enqueue: Callable[[int], None],
        pool: GraphPool,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._sizes = sorted(sizes)
        self._enqueue = enqueue
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if pool.device.type == "cuda":
            self._capture(what, pool, progress)

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

    def _capture(self, what: str, pool: GraphPool, progress: Callable[[str], None]) -> None:
        """Largest first: the others find their memory in the pool already."""
        stream = torch.cuda.Stream(pool.device)
        stream.wait_stream(torch.cuda.current_stream(pool.device))
        gc.collect()
        gc.disable()  # a tensor freed by the collector amid a capture would break it
        try:
            for done, size in enumerate(reversed(self._sizes), 1):
                self._graphs[size] = pool.capture(functools.partial(self._enqueue, size), stream)
                if done % 8 == 0 or done == len(self._sizes):
                    progress(f"capturing {what}: {done} of {len(self._sizes)} sizes")
        finally:
            gc.enable()
        torch.cuda.current_stream(pool.device).wait_stream(stream)
