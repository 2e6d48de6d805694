"""Times matrix products at Qwen3-8B's shapes beside torch's own, LightLLM's and the floor.

    python -m benchmarks.gpu.gemm [--rows 16,64] [--formats channel,plain] [--shapes qkv,head]
                                  [--check-only] [--write] [--jobs 8]

Formats: FP8 weights with a scale per output channel (torch: `_scaled_mm`, row-wise, fast
accumulation; LightLLM: `scaled_mm_per_token`, see benchmarks/gpu/gemm_peers.py), block-scaled FP8
weights, bf16 weights (torch: cuBLAS). Every product is checked in higher precision before it is
timed; `error` is relative to that, so that the fast accumulation of FP8 shows beside the other
modes. Launched early (PDL), as a step launches them; a decode product's partial sums are left to
the next kernel, as a step leaves them. --jobs processes compile and check everything before.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import triton

from benchmarks.gpu.gemm_peers import lightllm_calls
from benchmarks.gpu.timing import (
    Result,
    copy_bandwidth,
    num_sets,
    print_table,
    relative_error,
    require_close,
    time_graph,
)
from kernels.fp8_quant import FP8, GROUP, Fp8Rows, quantise
from kernels.linear import linear, prepare_weight
from kernels.product import Product
from kernels.tiles import TileTables
from kernels.weight import Weight

SHAPES = {
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "head": (151936, 4096),
}
FORMATS = ("channel", "plain", "block")
ROWS = (1, 16, 64, 128, 256, 512, 2048, 8192)
LIMIT = 5e-3
_JOBS = 8
# The head is bf16 in every model's step, and only ever sees a step's last tokens.
_HEAD_FORM, _HEAD_ROWS = "plain", 256
# Rows of a result that are compared.
_CHECKED_ROWS = 256
# Two or three times per product: short replays are enough, their median is taken.
_REPLAY_S = 1.5e-3

Rows = torch.Tensor | Fp8Rows
Call = Callable[[], object]
Row = dict[str, object]


def run(bandwidth: float) -> Result:
    """Checks and times everything; ValueError if a product is wrong."""
    cases = [(form, name, ROWS) for form in FORMATS for name in SHAPES]
    _check_in_parallel(cases, _JOBS)
    return _result([row for case in cases for row in _shape(*case, bandwidth)], bandwidth)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--jobs", type=int, default=_JOBS)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    row_counts = tuple(int(n) for n in options.rows.split(","))
    forms, names = options.formats.split(","), options.shapes.split(",")
    cases = [(form, name, row_counts) for form in forms for name in names]
    _check_in_parallel(cases, options.jobs)
    if options.check_only:
        return
    bandwidth = copy_bandwidth()
    rows: list[Row] = []
    for form, name, _ in cases:
        measured = list(_shape(form, name, row_counts, bandwidth))
        if measured:
            print_table(f"{form} {name} (copy {bandwidth / 1e9:.0f} GB/s)", measured)
        rows += measured
    if options.write:
        print(_result(rows, bandwidth).write())


def _result(rows: Sequence[Row], bandwidth: float) -> Result:
    return Result(
        name="gemm",
        what="matrix products, L2-cold, CUDA graphs, medians; us a call, launched early (PDL)",
        rows=rows,
        copy_bytes_per_s=bandwidth,
    )


def _check_in_parallel(cases: Sequence[tuple[str, str, Sequence[int]]], num_jobs: int) -> None:
    """Compiles and checks every case; ValueError if a product is wrong."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_jobs, mp_context=spawn) as pool:
        for lines in pool.map(_check_case, cases):
            if lines:
                print_table(f"checked {lines[0]['format']} {lines[0]['shape']}", lines)


def _check_case(case: tuple[str, str, Sequence[int]]) -> list[Row]:
    return list(_shape(*case, 0.0))


def _shape(form: str, name: str, row_counts: Sequence[int], bandwidth: float) -> Iterator[Row]:
    """One measurement per number of rows; only checks where bandwidth is 0."""
    if name == "head":
        row_counts = [n for n in row_counts if form == _HEAD_FORM and n <= _HEAD_ROWS]
    if not row_counts:
        return
    num_cols, width = SHAPES[name]
    weights = _weights(form, num_cols, width, cold=bandwidth > 0)
    wide = weights[0].dequantise()
    for num_rows in row_counts:
        x = _rows(form, num_rows, width)
        reference = _reference(x, wide)
        ours = [_ours(x, weight) for weight in weights]
        torchs = _torch_calls(form, x, weights)
        peers: list[list[Call]] = []
        if form == "channel" and isinstance(x, Fp8Rows):
            peers = lightllm_calls(x, weights)
        line: Row = {"format": form, "shape": name, "rows": num_rows}
        line["error"] = _check(f"{form} {name} {num_rows}", ours[0](), reference)
        if torchs:
            line["torch_error"] = _check(f"torch {name} {num_rows}", torchs[0](), reference)
        for peer in peers:
            _check(f"LightLLM {name} {num_rows}", peer[0](), reference)
        if bandwidth:
            line |= _times(ours, torchs, peers)
            line |= _rates(num_rows, num_cols, width, weights[0], line["us"], bandwidth)
        yield line


def _rates(
    num_rows: int, num_cols: int, width: int, weight: Weight, us: object, bandwidth: float
) -> dict[str, object]:
    """The floor at the copy's bandwidth, the share of it that was reached, TFLOP/s."""
    assert isinstance(us, float)
    size = weight.values.element_size()
    num_bytes = size * width * (num_cols + num_rows) + 2 * num_rows * num_cols
    floor_us = num_bytes / bandwidth * 1e6
    return {
        "floor_us": round(floor_us, 2),
        "percent_of_copy": round(100 * floor_us / us, 1),
        "tflops": round(2 * num_rows * num_cols * width / us / 1e6, 1),
    }


def _times(
    calls: Sequence[Call], torch_calls: Sequence[Call], peer_calls: Sequence[Sequence[Call]]
) -> dict[str, float]:
    """The better of two turns each for ours and torch's, so that neither has the cooler chip."""
    times = {"us": _microseconds(calls)}
    if torch_calls:
        times["torch_us"] = min(_microseconds(torch_calls), _microseconds(torch_calls))
        times["us"] = min(times["us"], _microseconds(calls))
    if peer_calls:
        times["lightllm_us"] = min(_microseconds(peer) for peer in peer_calls)
    return times


def _microseconds(calls: Sequence[Call]) -> float:
    return round(time_graph(calls, num_replays=7, replay_s=_REPLAY_S) * 1e6, 2)


def _weights(form: str, num_cols: int, width: int, *, cold: bool) -> list[Weight]:
    """Sets enough to stay L2-cold, or one, of one random weight with its rows turned."""
    gpu, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    tables = TileTables.load(gpu, triton.__version__, capability=capability)
    values = torch.randn(num_cols, width, device="cuda")
    scales = None
    if form == "channel":
        rows = quantise(values)
        values, scales = rows.values, rows.scales.view(-1)
    elif form == "block":
        scales = torch.rand(-(-num_cols // GROUP), -(-width // GROUP), device="cuda") + 0.5
        values = values.to(FP8)
    else:
        values = values.bfloat16()
    plain = values.view(torch.uint8)
    count = num_sets(plain.numel()) if cold else 1
    turned = [plain.roll(GROUP * i, 0) for i in range(count)]
    return [prepare_weight(t.view(values.dtype), scales, tables=tables) for t in turned]


def _rows(form: str, num_rows: int, width: int) -> Rows:
    x = torch.randn(num_rows, width, device="cuda")
    if form == "plain":
        return x.bfloat16()
    return quantise(x, GROUP if form == "block" else None)


def _ours(x: Rows, weight: Weight) -> Call:
    return lambda: linear(x, weight, dtype=torch.bfloat16, partial=True, pdl=True)


def _reference(x: Rows, weight: torch.Tensor) -> torch.Tensor:
    """Of the first rows, in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    wide = x.dequantise(torch.float32) if isinstance(x, Fp8Rows) else x.float()
    return wide[:_CHECKED_ROWS] @ weight.t()


def _check(what: str, out: object, reference: torch.Tensor) -> float:
    finished = out.sum(torch.bfloat16) if isinstance(out, Product) else out
    assert isinstance(finished, torch.Tensor)
    first = finished[: reference.shape[0]]
    require_close(what, first, reference, LIMIT)
    return round(relative_error(first, reference), 6)


def _torch_calls(form: str, x: Rows, weights: Sequence[Weight]) -> list[Call]:
    """torch's product on the same sets; none for block-scaled weights."""
    if isinstance(x, torch.Tensor):
        return [partial(torch.mm, x, w.values.t()) for w in weights]
    if form == "block":
        return []
    return [partial(_scaled_mm, x, w) for w in weights]


def _scaled_mm(x: Fp8Rows, weight: Weight) -> torch.Tensor:
    assert weight.scales is not None
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales,
        scale_b=weight.scales[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


if __name__ == "__main__":
    main()
