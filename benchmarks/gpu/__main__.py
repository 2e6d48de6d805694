"""Runs the GPU benchmarks, prints their tables and writes benchmarks/results/*.json.

    python -m benchmarks.gpu [gemm norm attention sampling engine moe_engine]

Each benchmark compares its operations with their references before it times them, and is a process
of its own, so that it has the whole memory. It is a module beside this one: with `run(bandwidth) ->
Result`, bandwidth being that of a copy in bytes per second, or with a command line that knows
--write.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys

import torch

from benchmarks.gpu.timing import RESULTS, copy_bandwidth, environment, print_table

NAMES = ("gemm", "norm", "attention", "sampling", "engine", "moe_engine")


def main() -> int:
    """0 if every benchmark ran and passed its checks, else 1."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    names = parser.parse_args().names or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        parser.error(f"{unknown} unknown; known: {', '.join(NAMES)}")
    if not torch.cuda.is_available():
        print("no CUDA GPU (torch.cuda.is_available() is false)", file=sys.stderr)
        return 1
    if len(names) == 1:
        return _run_one(names[0])
    print(", ".join(f"{name} {value}" for name, value in environment().items()), flush=True)
    failed = [name for name in names if _start("benchmarks.gpu", name)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run_one(name: str) -> int:
    """Exit status; runs in this process what has `run`."""
    module = importlib.import_module(f"benchmarks.gpu.{name}")
    if not hasattr(module, "run"):
        return _start(module.__name__, "--write")
    bandwidth = copy_bandwidth()
    result = module.run(bandwidth)
    print_table(f"{result.what} (copy {bandwidth / 1e12:.2f} TB/s)", result.rows)
    print(f"written to {result.write()}")
    return 0


def _start(module: str, *arguments: str) -> int:
    """Exit status of `python -m module arguments`."""
    print(f"\n=== python -m {module} {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=RESULTS.parents[1]).returncode


if __name__ == "__main__":
    sys.exit(main())
