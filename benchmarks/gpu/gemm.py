"""Times matrix products at Qwen3-8B's shapes beside torch's own, LightLLM's and the floor.

    python -m benchmarks.gpu gemm
    python -m benchmarks.gpu.gemm [--check-only] [--rows 16,64] [--formats channel,plain]

Formats: FP8 weights with a scale per output channel (torch: `_scaled_mm`, row-wise, fast
accumulation; LightLLM: `scaled_mm_per_token`, if .peers/lightllm_scaled_mm.py is there, its tile
sizes tried around), block-scaled FP8 weights, bf16 weights (torch: cuBLAS). Every product is
checked in higher precision before it is timed; `error` is relative to that, so that the fast
accumulation of FP8 shows beside the other modes. Launched early (PDL), as a step launches them;
a decode product's partial sums are left to the next kernel, as a step leaves them.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

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
ROWS = (1, 16, 64, 128, 256, 2048, 8192)
LIMIT = 5e-3
_PEER = Path(__file__).parents[2] / ".peers" / "lightllm_scaled_mm.py"
_MAX_REFERENCE_ROWS = 256

Rows = torch.Tensor | Fp8Rows
Call = Callable[[], object]


def run(bandwidth: float) -> Result:
    """Checks and times everything; ValueError if a product is wrong."""
    rows: list[dict[str, object]] = []
    for form in FORMATS:
        for name in SHAPES:
            rows += _shape(form, name, ROWS, bandwidth)
    return Result(
        name="gemm",
        what="matrix products, L2-cold, CUDA graphs, medians; us a call",
        rows=rows,
        copy_bytes_per_s=bandwidth,
    )


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--check-only", action="store_true")
    options = parser.parse_args()
    bandwidth = 0.0 if options.check_only else copy_bandwidth()
    for form in options.formats.split(","):
        for name in options.shapes.split(","):
            rows = list(_shape(form, name, [int(n) for n in options.rows.split(",")], bandwidth))
            if rows:
                print_table(f"{form} {name} (copy {bandwidth / 1e9:.0f} GB/s)", rows)


def _shape(
    form: str, name: str, row_counts: Sequence[int], bandwidth: float
) -> Iterator[dict[str, object]]:
    """One measurement per number of rows; only checks where bandwidth is 0."""
    if name == "head" and form != "plain":
        return
    num_cols, width = SHAPES[name]
    weights = _weights(form, num_cols, width)
    wide = weights[0].dequantise()
    for num_rows in row_counts:
        if name == "head" and num_rows > _MAX_REFERENCE_ROWS:
            continue
        x = _rows(form, num_rows, width)
        calls = [_ours(x, weight) for weight in weights]
        reference = _reference(x, wide)
        error = _check(f"{form} {name} {num_rows}", calls[0](), reference)
        torch_calls = _torch_calls(form, x, weights)
        peer_calls = _peer_calls(form, x, weights)
        for peer in peer_calls:
            peer[0]()
        line: dict[str, object] = {"format": form, "shape": name, "rows": num_rows}
        line["error"] = error
        if torch_calls:
            line["torch_error"] = _check(f"torch {name}", torch_calls[0](), reference)
        if bandwidth:
            line |= _times(calls, torch_calls, peer_calls)
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
    return round(time_graph(calls, num_replays=7) * 1e6, 2)


def _weights(form: str, num_cols: int, width: int) -> list[Weight]:
    """Sets enough to stay L2-cold, of one random weight with its rows turned."""
    gpu = torch.cuda.get_device_name()
    tables = TileTables.load(gpu, _triton(), capability=torch.cuda.get_device_capability())
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
    turned = [plain.roll(GROUP * i, 0) for i in range(num_sets(plain.numel()))]
    return [prepare_weight(t.view(values.dtype), scales, tables=tables) for t in turned]


def _triton() -> str:
    import triton

    return triton.__version__


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
    return wide[:_MAX_REFERENCE_ROWS] @ weight.t()


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


def _peer_calls(form: str, x: Rows, weights: Sequence[Weight]) -> list[list[Call]]:
    """LightLLM's product for decode sizes, in several of the tile sizes that it tunes over."""
    if form != "channel" or not _PEER.is_file() or not isinstance(x, Fp8Rows):
        return []
    num_rows, peer = x.values.shape[0], _load(_PEER)
    if num_rows > _MAX_REFERENCE_ROWS:
        return []
    out = torch.empty(num_rows, weights[0].values.shape[0], device="cuda", dtype=torch.bfloat16)
    found: list[list[Call]] = []
    for block_m in {16, 64} if num_rows > 16 else {16}:
        for block_n, block_k, stages in ((64, 128, 6), (64, 256, 4), (128, 128, 4), (128, 256, 3)):
            config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8}
            config |= {"num_stages": stages, "num_warps": 4}
            run = peer.scaled_mm_per_token
            found.append(
                [partial(run, x.values, w.values, x.scales, w.scales, out, config) for w in weights]
            )
    return found


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
