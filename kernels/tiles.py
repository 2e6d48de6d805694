"""Tile tables: which tile sizes an operation uses, by (operation, shape, number of rows, GPU).

Owns the form of kernels/tables/*.json and of a user's own tables, and which table a GPU falls back
to. Immutable; callers load one and pass it on. Never measures (kernels/tune.py does), and never
holds an operation's own defaults: where a table says "heuristic", or nothing, the operation decides
by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
import triton

from kernels.tile_format import Entry, Values, check_values, read_table

FOLDER = Path(__file__).parent / "tables"
# GPU name -> tables, first found wins. Chips of one architecture share a fallback.
_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"\bH200\b", ("h200", "h100")),
    (r"\bH100\b", ("h100",)),
)
_HOPPER = (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """What of a model decides its shapes, in values."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class _HasDims(Protocol):
    """Dims, or engine's ModelConfig."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def linear_key(n: int, k: int) -> str:
    """Key of a product with a weight [n, k]."""
    return f"{n}x{k}"


def attention_key(num_heads: int, num_kv_heads: int, head_dim: int) -> str:
    """Key of attention with num_heads query heads on num_kv_heads."""
    return f"{num_heads}x{num_kv_heads}x{head_dim}"


def width_key(width: int) -> str:
    """Key of an operation over rows of that many values."""
    return str(width)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileTables:
    """Tables for one GPU.

    entries: by "<op>/<key>"; settings: values by op that hold whatever an entry says; notes: what
    a user should know about where they come from (another GPU's table, another Triton).
    """

    entries: Mapping[str, Entry]
    settings: Mapping[str, Values] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        gpu_name: str,
        triton_version: str,
        cache_dir: Path | None = None,
        *,
        capability: tuple[int, int] | None = None,
    ) -> TileTables:
        """Shipped tables for the GPU, overridden entry by entry by cache_dir's own.

        gpu_name, capability: as CUDA reports them. An unknown GPU of compute capability 9.0 gets
        the H100's tables, any other none: every operation then decides by itself. ValueError names
        file, key and value of what is wrong in a table.
        """
        names = shipped_names(gpu_name, capability)
        paths = [FOLDER / f"{name}.json" for name in reversed(names)]
        notes: list[str] = []
        if not names:
            notes.append(f"no tile table ships for {gpu_name}: tiles are each operation's defaults")
        elif names[0] not in table_name(gpu_name):
            notes.append(f"no tile table ships for {gpu_name}: {names[0]}'s is used")
        if cache_dir is not None:
            own = cache_dir / f"{table_name(gpu_name)}.json"
            paths += [own] if own.is_file() else []
        entries: dict[str, Entry] = {}
        for path in paths:
            table = read_table(path)
            if table.triton != minor(triton_version):
                notes.append(
                    f"{path.name} was tuned with Triton {table.triton}, this is {triton_version}: "
                    "right, but maybe not the fastest"
                )
            entries.update(table.entries)
        return cls(entries=entries, notes=tuple(notes))

    @classmethod
    def of_device(cls, device: torch.device, cache_dir: Path | None = None) -> TileTables:
        """`load` for a device of this machine; empty for a CPU, whose twins have no tiles."""
        if device.type != "cuda":
            return cls.empty()
        return cls.load(
            torch.cuda.get_device_name(device),
            triton.__version__,
            cache_dir,
            capability=torch.cuda.get_device_capability(device),
        )

    @classmethod
    def empty(cls) -> TileTables:
        """No entries: every operation decides by itself."""
        return cls(entries={})

    def find(self, op: str, key: str) -> Entry | None:
        """The entry, also a heuristic one; None if this shape is not in the table."""
        return self.entries.get(f"{op}/{key}")

    def at(self, op: str, key: str, num_rows: int) -> Values | None:
        """Tile values for num_rows rows; None where the operation's own heuristic decides.

        Values that are not there are the operation's defaults.
        """
        entry = self.find(op, key)
        values = entry.at(num_rows) if entry is not None else None
        setting = self.settings.get(op)
        return values if setting is None else {**(values or {}), **setting}

    def with_setting(self, op: str, **values: int) -> TileTables:
        """These values for every shape and number of rows of op: a user's setting."""
        check_values(op, values)
        return replace(self, settings={**self.settings, op: values})


def table_name(gpu_name: str) -> str:
    """File name of a GPU's table, without suffix: "h100", or the name in lower case."""
    for pattern, names in _FAMILIES:
        if re.search(pattern, gpu_name):
            return names[0]
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def shipped_names(gpu_name: str, capability: tuple[int, int] | None) -> tuple[str, ...]:
    """Shipped tables for a GPU, first found wins; empty if none fits."""
    for pattern, names in _FAMILIES:
        if re.search(pattern, gpu_name):
            return names
    return ("h100",) if capability == _HOPPER else ()


def minor(version: str) -> str:
    """The first two numbers of a version: "3.6" of "3.6.0"."""
    return ".".join(version.split(".")[:2])


def required_keys(dims: _HasDims) -> list[str]:
    """Every "<op>/<key>" that the engine asks for with a model of these dimensions."""
    query, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    hidden, width = dims.hidden_size, dims.intermediate_size
    layer = [(query + 2 * kv, hidden), (hidden, query), (2 * width, hidden), (hidden, width)]
    keys = [f"{op}/{linear_key(n, k)}" for op in ("gemm", "fp8_gemm") for n, k in layer]
    keys.append(f"gemm/{linear_key(dims.vocab_size, hidden)}")
    keys.append(f"rmsnorm/{width_key(hidden)}")
    keys.append(f"paged_decode/{attention_key(dims.num_heads, dims.num_kv_heads, dims.head_dim)}")
    return keys
