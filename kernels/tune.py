"""Searches the fastest tiles on this machine's GPU and writes a versioned table.

    python -m kernels.tune --ops gemm,rmsnorm --model Qwen3-8B --rows 1,16,64 --out FILE
    python -m kernels.tune --model path/to/model --cache DIR

--out names the table; --cache is the directory that the engine reads a user's own tables from. What
a table already holds of other operations and shapes stays. Owns the command; never knows how an
operation runs (kernels/tunable.py) or which configurations are acceptable (kernels/tile_search.py).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton

from kernels.matmul_tiles import DECODE_ROWS, ROW_COUNTS
from kernels.tile_format import Entry, Table, Values, read_table, write_table
from kernels.tile_search import Search
from kernels.tiles import FOLDER, Dims, minor, required_keys, table_name
from kernels.timing import time_graph
from kernels.tunable import OPS, make_tunable
from kernels.tune_guard import Guard, Watch

_DECODE_ROWS = (1, 16, 32, 64, 128, 256)
_PREFILL_ROWS = (512, 2048, 8192)
# Row counts that an operation is asked for.
_ROWS = {
    "fp8_gemm": ROW_COUNTS,
    "gemm": ROW_COUNTS,
    "paged_decode": _DECODE_ROWS,
    "rmsnorm": (*_DECODE_ROWS, *_PREFILL_ROWS),
}
# Values of one result, and of its reference: bounds the memory of a search.
_MAX_RESULTS = 2**28
# As transformers writes them, in config.json.
_CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes what the arguments ask for; argument errors end the process with status 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        keys = wanted_keys(options.model, options.shapes, options.ops)
        path = options.out or options.cache / f"{table_name(_gpu_name())}.json"
        table = _existing(path)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(keys)} shapes on {table.gpu}, Triton {triton.__version__}, to {path}", flush=True)
    started_at = time.monotonic()
    lost: set[Hashable] = set()
    if options.jobs > 1 or options.check_only:
        lost |= _check_in_parallel(keys, options.rows, options.jobs)
    if options.check_only:
        return
    tasks = [Task(name=key, rows=options.rows, verbose=options.verbose) for key in keys]
    for name, entry in Guard(work=_search, lost=lost).results(tasks):
        if entry is not None:
            entries = {**table.entries, name: entry}
            table = Table(gpu=table.gpu, triton=table.triton, entries=entries)
            write_table(path, table)
        if options.seconds and time.monotonic() - started_at > options.seconds:
            print(f"{options.seconds} s are over after {name}", flush=True)
            break


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One "<op>/<key>", at the row counts asked for; of a check, every num_parts-th
    configuration from `part` on.
    """

    name: str
    rows: Sequence[int]
    verbose: bool = False
    part: int = 0
    num_parts: int = 1


def wanted_keys(model: str | None, shapes: Sequence[str], ops: Sequence[str]) -> list[str]:
    """Names in a table ("<op>/<key>") of a model's shapes and of explicit ones, for ops.

    ValueError says what is wrong.
    """
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        raise ValueError(f"--ops: {unknown} unknown; known: {list(OPS)}")
    keys = [] if model is None else required_keys(read_dims(model))
    keys = [key for op in ops for key in keys if key.startswith(f"{op}/")]
    keys += [f"{op}/{shape}" for op in ops for shape in shapes if _fits(op, shape)]
    if not keys:
        raise ValueError("nothing to tune: --model or --shapes is needed, with one of the --ops")
    return list(dict.fromkeys(keys))


def _fits(op: str, shape: str) -> bool:
    """Whether the shape has as many numbers as a key of op."""
    parts = shape.split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--shapes: {shape!r}; positive numbers with x between them are needed")
    num_parts = {"rmsnorm": 1, "paged_decode": 3}.get(op, 2)
    return len(parts) == num_parts


def read_dims(model: str) -> Dims:
    """Dimensions of a model directory's config.json, or of a name in tables/models.json."""
    named = json.loads((FOLDER / "models.json").read_text())
    if model in named:
        return Dims(**named[model])
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ValueError(f"--model: {model!r} is no model directory and none of {sorted(named)}")
    raw = json.loads(path.read_text())
    missing = sorted(name for name in _CONFIG_NAMES.values() if name not in raw)
    if missing:
        raise ValueError(f"{path}: {missing} missing")
    dims = {name: raw[theirs] for name, theirs in _CONFIG_NAMES.items()}
    head_dim = raw.get("head_dim") or dims["hidden_size"] // dims["num_heads"]
    return Dims(head_dim=head_dim, **dims)


def _search(task: Task, watch: Watch) -> tuple[str, Entry | None]:
    """The task's name, and the best found for it."""
    op, _, key = task.name.partition("/")
    counts = _row_counts(op, key, task.rows)
    if not counts:
        return task.name, None
    report = partial(print, flush=True) if task.verbose else _no_report
    begin = partial(_begin, watch, task.name)
    tunable = make_tunable(op, key, max(counts))
    search = Search(tunable=tunable, timer=_time, report=report, begin=begin)
    started_at = time.monotonic()
    entry = search.run(
        counts, {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d")}
    )
    spent = f"{time.monotonic() - started_at:.1f} s, {search.num_refused} refused"
    if entry is None:
        print(f"{task.name}: nothing acceptable ({spent})", flush=True)
        return task.name, None
    print(f"{task.name}: {dict(entry.order)} us {entry.about['us']} ({spent})", flush=True)
    for limit, values in entry.rows:
        print(f"  rows {limit}: {dict(values)}", flush=True)
    return task.name, entry


def _begin(watch: Watch, name: str, num_rows: int, tiles: Values) -> bool:
    # A broken GPU context is the attempt's before, and ends the process as such.
    torch.cuda.synchronize()
    return watch.begins((name, num_rows, tuple(sorted(tiles.items()))))


def _time(calls: Sequence[Callable[[], object]]) -> float:
    return time_graph(calls, num_replays=7, replay_s=1e-3)


def _no_report(line: str) -> None:
    del line


def _row_counts(op: str, key: str, rows: Sequence[int]) -> list[int]:
    """rows as far as op is asked for them; the usual ones without any.

    A product's entry serves its two kernels, for few and for many rows: none of them goes without.
    """
    usual = _ROWS[op]
    counts = {n for n in rows or usual if usual[0] <= n <= usual[-1]}
    if usual is ROW_COUNTS and counts:
        num_cols = int(key.partition("x")[0])
        most = [n for n in usual if n <= DECODE_ROWS or n * num_cols <= _MAX_RESULTS]
        counts = {n for n in counts if n <= most[-1]} | {DECODE_ROWS, most[-1]}
    return sorted(counts)


def _check_in_parallel(keys: Sequence[str], rows: Sequence[int], num_jobs: int) -> set[Hashable]:
    """Compiles and checks everything in num_jobs processes, so that the search only times; returns
    what never came back.
    """
    started_at = time.monotonic()
    guards = [Guard(work=_check_part) for _ in range(num_jobs)]
    tasks = [
        [Task(name=key, rows=rows, part=part, num_parts=num_jobs) for key in keys]
        for part in range(num_jobs)
    ]
    with ThreadPoolExecutor(num_jobs) as pool:
        found = pool.map(lambda guard, part: list(guard.results(part)), guards, tasks)
        lines = [line for part in found for lines in part for line in lines]
    print("\n".join(sorted(lines)), flush=True)
    print(f"checked in {time.monotonic() - started_at:.1f} s, {len(lines)} refused", flush=True)
    return set().union(*(guard.lost for guard in guards))


def _check_part(task: Task, watch: Watch) -> list[str]:
    """What was refused, in words."""
    op, _, key = task.name.partition("/")
    counts = _row_counts(op, key, task.rows)
    lines: list[str] = []
    if counts:
        tunable = make_tunable(op, key, max(counts))
        begin = partial(_begin, watch, task.name)
        search = Search(tunable=tunable, timer=_time, report=lines.append, begin=begin)
        search.check(counts, task.part, task.num_parts)
    return lines


def _existing(path: Path) -> Table:
    """The table at path, or an empty one for this GPU; ValueError if it is another GPU's."""
    gpu, version = _gpu_name(), minor(triton.__version__)
    entries = {}
    if path.is_file():
        table = read_table(path)
        if table_name(table.gpu) != table_name(gpu):
            raise ValueError(f"{path} is for {table.gpu}, this is {gpu}")
        if table.triton == version:
            entries = table.entries
        else:  # its entries would pass as this Triton's
            print(f"{path} is of Triton {table.triton}: its {len(table.entries)} entries go")
    return Table(gpu=gpu, triton=version, entries=entries)


def _gpu_name() -> str:
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU on this machine: tiles are measured, not guessed")
    return torch.cuda.get_device_name()


def _parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m kernels.tune", description=__doc__, formatter_class=about
    )
    parser.add_argument("--ops", type=_words, default=list(OPS), metavar="OP,...")
    parser.add_argument("--model", help="model directory, or a name in kernels/tables/models.json")
    parser.add_argument("--shapes", type=_words, default=[], metavar="NxK,...")
    parser.add_argument(
        "--rows", type=_numbers, default=[], metavar="M,...", help="default: all usual"
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, metavar="FILE")
    place.add_argument("--cache", type=Path, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile beforehand")
    parser.add_argument("--check-only", action="store_true", help="compile and check, do not time")
    parser.add_argument("--seconds", type=float, help="start no shape after so long")
    parser.add_argument("--verbose", action="store_true", help="a line for every configuration")
    return parser


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in _words(text)]
    if not all(number > 0 for number in numbers):
        raise ValueError(text)
    return numbers


if __name__ == "__main__":
    main()
