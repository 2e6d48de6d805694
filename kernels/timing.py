"""How long a kernel takes when its inputs are not in the cache, and how far its result is off.

Owns the one way this project times kernels: many calls in a CUDA graph, over rotated sets of random
inputs, median over replays. Never decides what is timed, and no test calls it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch

COLD_NUM_BYTES = 160_000_000
"""What the sets must touch together: three times the L2 of an H100 (50 MB) or H200 (60 MB)."""

# A replay this long hides the 10 µs of its launch to 0.3 %.
REPLAY_S = 3e-3
_MAX_NODES = 2000
_COPY_NUM_BYTES = 2**30
# Rows at a time: float64 copies of a large result stay small.
_ERROR_ROWS = 512


def num_sets(num_bytes: int, *, limit: int = 256) -> int:
    """Sets of num_bytes each (what one call reads and writes) that keep every call L2-cold.

    limit bounds the sets of tiny inputs; those are launch-bound, wherever their bytes are.
    """
    return min(limit, max(2, math.ceil(COLD_NUM_BYTES / max(1, num_bytes))))


def time_graph(
    calls: Sequence[Callable[[], object]], *, num_replays: int = 15, replay_s: float = REPLAY_S
) -> float:
    """Median seconds of one of the calls (same shapes, one set of inputs each, see `num_sets`).

    All calls run in order on one stream, repeated inside one CUDA graph that takes replay_s or
    more; each call runs once before (compilation, handles). A call may not synchronise with the
    host.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    once_s = _replay_s(_capture(calls, 1, stream), stream, 3)
    most = max(1, _MAX_NODES // len(calls))
    num_rounds = max(1, min(most, math.ceil(replay_s / once_s)))
    graph = _capture(calls, num_rounds, stream)
    return _replay_s(graph, stream, num_replays) / (num_rounds * len(calls))


def copy_bandwidth(num_bytes: int = _COPY_NUM_BYTES) -> float:
    """Bytes per second (read + written) of the faster of two device-to-device copies.

    The driver's own and an elementwise kernel's, in four pieces that follow one another, so that
    each is cold. The driver's alone would flatter what it is compared with: on an H100 it moves 3.0
    TB/s in pieces of 256 MiB and 2.4 TB/s in pieces of 1 GiB.
    """
    pieces = []
    for _ in range(4):
        source = torch.randint(2**31 - 1, (num_bytes // 16,), dtype=torch.int32, device="cuda")
        pieces.append((source, torch.empty_like(source)))
    driver = [lambda one=one: one[1].copy_(one[0]) for one in pieces]
    kernel = [lambda one=one: torch.neg(one[0], out=one[1]) for one in pieces]
    return num_bytes / 2 / min(time_graph(driver), time_graph(kernel))


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| (Frobenius, float64); infinite if out is not finite.

    Both [num_rows, ...] of one shape.
    """
    error = norm = 0.0
    for one, exact in zip(out.split(_ERROR_ROWS), reference.split(_ERROR_ROWS), strict=True):
        wide = exact.double()
        error += (one.double() - wide).square().sum().item()
        norm += wide.square().sum().item()
    return math.sqrt(error / max(norm, 1e-300)) if math.isfinite(error) else math.inf


def require_close(what: str, out: torch.Tensor, reference: torch.Tensor, limit: float) -> float:
    """The relative error; ValueError if it is above limit. The gate before every timing."""
    if out.shape != reference.shape:
        raise ValueError(f"{what}: shape {list(out.shape)}, reference {list(reference.shape)}")
    error = relative_error(out, reference)
    if not error <= limit:
        raise ValueError(f"{what}: relative error {error:.2e}, limit {limit:.0e}")
    return error


def _capture(
    calls: Sequence[Callable[[], object]], num_rounds: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(num_rounds):
            for call in calls:
                call()
    return graph


def _replay_s(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, num_replays: int) -> float:
    """Median seconds of a replay."""
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(num_replays)
    ]
    with torch.cuda.stream(stream):
        graph.replay()  # the first replay uploads the graph
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
    stream.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3
