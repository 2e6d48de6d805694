"""The form of a tile table: reading, checking, writing.

Owns every rule of what may stand in one. Never chooses a table or a tile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1
HEURISTIC, TUNED = "heuristic", "tuned"
SOURCES = (HEURISTIC, TUNED)

Values = Mapping[str, int]
"""Tile values by name: block_m, block_n, block_k, num_splits, num_warps, num_stages, ..."""

_POWERS = {"num_warps": 32}
_LARGEST = {"num_stages": 16, "num_splits": 256}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Tiles of one (operation, shape).

    order: the values that fix the order of summation (block_k, num_splits, ...), the same for every
    number of rows; rows: (largest number of rows, other values), ascending; source: "tuned", or
    "heuristic" without values; about: how it was tuned (GPU, date, times), for readers only.
    """

    source: str
    order: Values
    rows: tuple[tuple[int, Values], ...]
    about: Mapping[str, object]

    def at(self, num_rows: int) -> Values | None:
        """order and the other values of the smallest row count listed that holds num_rows.

        Above the largest, its own; None for a heuristic entry.
        """
        if not self.rows:
            return self.order or None
        for limit, values in self.rows:
            if num_rows <= limit:
                return {**self.order, **values}
        return {**self.order, **self.rows[-1][1]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One file: the GPU and Triton (major.minor) that it was tuned with, entries by "op/key"."""

    gpu: str
    triton: str
    entries: Mapping[str, Entry]


def read_table(path: Path) -> Table:
    """ValueError names file, key and value of the first thing that is wrong."""
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        found = raw.get("version") if isinstance(raw, dict) else raw
        raise ValueError(
            f"{path}: version is {found!r}; this program reads version {VERSION}. "
            "Tune again, or remove the file"
        )
    for name, kind in (("gpu", str), ("triton", str), ("entries", dict)):
        if not isinstance(raw.get(name), kind):
            raise ValueError(f"{path}: {name} is {raw.get(name)!r}; it must be a {kind.__name__}")
    entries = {
        key: _entry(f"{path}: entries[{key!r}]", value) for key, value in raw["entries"].items()
    }
    return Table(gpu=raw["gpu"], triton=raw["triton"], entries=entries)


def write_table(path: Path, table: Table) -> None:
    """Writes one line per row count, so that two tables can be compared line by line."""
    lines = [
        "{",
        f'  "version": {VERSION},',
        f'  "gpu": {json.dumps(table.gpu)},',
        f'  "triton": {json.dumps(table.triton)},',
        '  "entries": {',
    ]
    entries = [_entry_lines(key, table.entries[key]) for key in sorted(table.entries, key=_order)]
    lines.append(",\n".join(entries))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "  }", "}"]) + "\n")


def _order(key: str) -> tuple[str, list[int]]:
    """Operations by name, shapes by size."""
    op, _, shape = key.partition("/")
    sizes = "".join(c if c.isdigit() else " " for c in shape).split()
    return op, [int(size) for size in sizes]


def _entry_lines(key: str, entry: Entry) -> str:
    head = {"source": entry.source, **({"order": dict(entry.order)} if entry.order else {})}
    head |= {"about": dict(entry.about)} if entry.about else {}
    text = json.dumps(head)
    if entry.rows:
        rows = [f'      "{limit}": {json.dumps(dict(values))}' for limit, values in entry.rows]
        text = text[:-1] + ', "rows": {\n' + ",\n".join(rows) + "}}"
    return f"    {json.dumps(key)}: {text}"


def _entry(where: str, raw: Any) -> Entry:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is {raw!r}; it must be an object")
    unknown = sorted(set(raw) - {"source", "order", "rows", "about"})
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}")
    if raw.get("source") not in SOURCES:
        raise ValueError(f"{where}: source is {raw.get('source')!r}; one of {list(SOURCES)}")
    order = _values(f"{where}.order", raw.get("order", {}))
    rows = raw.get("rows", {})
    if not isinstance(rows, dict) or not all(limit.isdigit() and int(limit) > 0 for limit in rows):
        raise ValueError(f"{where}.rows: keys must be row counts, they are {rows!r}")
    if (raw["source"] == TUNED) != bool(order or rows):
        raise ValueError(f"{where}: a tuned entry has values and a heuristic one has none")
    limits = sorted(rows, key=int)
    return Entry(
        source=raw["source"],
        order=order,
        rows=tuple((int(n), _values(f"{where}.rows[{n!r}]", rows[n])) for n in limits),
        about=raw.get("about", {}),
    )


def check_values(where: str, values: object) -> None:
    """ValueError names the first value that no kernel could take; `where` opens its message."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it must be an object")
    for name, value in values.items():
        place = f"{where}[{name!r}] is {value!r}"
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{place}; it must be an integer from 0 on")
        is_power = value > 0 and value & (value - 1) == 0
        if (name in _POWERS or name.startswith("block_")) and not is_power:
            raise ValueError(f"{place}; it must be a power of two")
        most = _POWERS.get(name, _LARGEST.get(name, 2**20))
        if value > most or (value < 1 and name in (*_POWERS, *_LARGEST)):
            raise ValueError(f"{place}; it must be 1 to {most}")


def _values(where: str, raw: Any) -> Values:
    check_values(where, raw)
    return raw
