"""Times the row kernels of a step: norm, SiLU, quantisation, what follows q|k|v, block digests.

    python -m benchmarks.gpu.norm [--parts norm,silu,qkv,digest,warps] [--check-only] [--write]

At Qwen3-8B's shape, beside separate kernels, torch, torch.compile (whose fused norm is what vLLM
runs) and LightLLM's rmsnorm, if .peers/lightllm_rmsnorm.py is there. Every case is compared with
its twin before it is timed. Percentages are of the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu.qkv_cases import digest_cases, qkv_cases
from benchmarks.gpu.row_cases import Case, norm_cases, silu_cases, warps_cases
from benchmarks.gpu.timing import Result, copy_bandwidth, num_sets, print_table, time_graph

# The size that an H100 copies fastest: 3.0 TB/s; 1 GiB runs at 2.4 TB/s.
COPY_NUM_BYTES = 2**28
PARTS = {
    "norm": norm_cases,
    "silu": silu_cases,
    "qkv": qkv_cases,
    "digest": digest_cases,
    "warps": warps_cases,
}


def measure(cases: Sequence[Case], copy: float) -> Iterator[dict[str, object]]:
    """Times cases that were checked."""
    for case in cases:
        calls = [case.make() for _ in range(1 if case.warm else num_sets(case.num_bytes))]
        seconds = time_graph(calls, num_replays=7)
        yield {
            "case": case.name,
            "rows": case.rows,
            "us": round(seconds * 1e6, 2),
            "gb_per_s": round(case.num_bytes / seconds / 1e9),
            "percent_of_copy": round(100 * case.num_bytes / seconds / copy, 1),
        }


def main() -> None:
    """Checks every case, then times them, part by part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="norm,silu,qkv,digest")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    parts = {name: list(PARTS[name]()) for name in arguments.parts.split(",")}
    for cases in parts.values():
        for case in cases:
            case.check()
            case.make()()
    torch.cuda.synchronize()
    if arguments.check_only:
        return
    copy = copy_bandwidth(COPY_NUM_BYTES)
    rows: list[dict[str, object]] = []
    for name, cases in parts.items():
        measured = list(measure(cases, copy))
        print_table(f"{name} (copy {copy / 1e9:.0f} GB/s)", measured)
        rows += measured
    if arguments.write:
        what = "row kernels at Qwen3-8B's shape, L2-cold, CUDA graphs, medians"
        print(Result(name="norm", what=what, rows=rows, copy_bytes_per_s=copy).write())


if __name__ == "__main__":
    main()
