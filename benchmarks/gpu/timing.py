"""What every GPU benchmark shares: kernels.timing, the environment line, result files.

Owns the form of benchmarks/results/*.json. Never holds a benchmark of its own.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

from kernels.timing import copy_bandwidth, num_sets, relative_error, require_close, time_graph

__all__ = [
    "RESULTS",
    "Result",
    "copy_bandwidth",
    "environment",
    "num_sets",
    "print_table",
    "relative_error",
    "require_close",
    "time_graph",
]

RESULTS = Path(__file__).resolve().parents[1] / "results"
Row = Mapping[str, object]


def environment() -> dict[str, str]:
    """GPU, driver and versions that a figure depends on, and the date."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver_version(),
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _driver_version() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (no nvidia-smi)"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One benchmark's outcome; rows: one flat mapping a measurement, units in the key's name."""

    name: str
    what: str
    rows: Sequence[Row]
    copy_bytes_per_s: float | None = None
    notes: Sequence[str] = ()
    about: Mapping[str, str] = field(default_factory=environment)

    def write(self, folder: Path = RESULTS) -> Path:
        """Writes folder/<name>.json, with the exact command of this process, and returns it."""
        value: dict[str, object] = {"what": self.what, **self.about, "command": command_line()}
        if self.copy_bytes_per_s is not None:
            value["copy_bandwidth_gb_per_s"] = round(self.copy_bytes_per_s / 1e9, 1)
        if self.notes:
            value["notes"] = list(self.notes)
        value["rows"] = [dict(row) for row in self.rows]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(value, indent=2) + "\n")
        return path


def command_line() -> str:
    """How this process was started, as one would type it from the repository's root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name:
        return " ".join(["python", *sys.argv])
    return " ".join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Prints rows as an aligned table; columns in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    print(title)
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
