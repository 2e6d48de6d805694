"""NIXL bandwidth between two processes against memcpy in the same run.

Owns a child process with an arena, a table on stdout and a JSON file. Checks that the bytes are
right before it times anything. Medians of repeats; memcpy is numpy.copyto over the same blocks.

    python -m benchmarks.transfer_bandwidth --out benchmarks/results/transfer_bandwidth.json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from kv.nixl_transfer import NixlTransfer
from kv.transfer import Agent

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    (4 * 2**10, 1),
    (64 * 2**10, 1),
    (64 * 2**10, 64),
    (64 * 2**10, 1024),
    (256 * 2**10, 256),
    (1 * 2**20, 64),
    (1 * 2**20, 256),
    (2 * 2**20, 128),
    (9 * 2**20, 28),
    (16 * 2**20, 16),
)
DEADLINE_S = 60.0

Arena = np.ndarray[Any, np.dtype[np.uint8]]


async def own_arena(num_bytes: int) -> None:
    """The child: owns a filled arena until its stdin ends."""
    loop = asyncio.get_running_loop()
    arena = np.random.default_rng(7).integers(0, 256, num_bytes, np.uint8)
    transfer = NixlTransfer.create(role="bench-owner", incarnation="child", arena=arena, loop=loop)
    agent = dataclasses.asdict(transfer.agent)
    print(json.dumps({**agent, "metadata": transfer.agent.metadata.hex()}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    transfer.close()


def start_owner(num_bytes: int) -> tuple[subprocess.Popen[str], Agent]:
    """The child process and its agent."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transfer_bandwidth", "--own", str(num_bytes)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    fields = json.loads(child.stdout.readline())
    return child, Agent(**{**fields, "metadata": bytes.fromhex(fields["metadata"])})


async def measure(agent: Agent, repeats: int) -> list[dict[str, Any]]:
    """All cases: rows of block size, count, GB/s (1e9) each way and ratios."""
    arena = np.zeros(agent.arena_num_bytes, dtype=np.uint8)
    loop = asyncio.get_running_loop()
    ours = NixlTransfer.create(role="bench", incarnation="parent", arena=arena, loop=loop)
    await ours.connect(agent)
    await check(ours, agent.name, arena)
    rows = [await measure_case(ours, agent.name, arena, *case, repeats) for case in CASES]
    ours.close()
    return rows


async def check(transfer: NixlTransfer, peer: str, arena: Arena) -> None:
    """Reads the child's bytes, writes over half of them, reads all back; SystemExit if wrong."""
    size, num = 1 << 20, len(arena) >> 20
    theirs = np.random.default_rng(7).integers(0, 256, len(arena), np.uint8)
    order = np.random.default_rng(8).permutation(num) * size
    local = np.arange(num) * size
    await transfer.read(peer, local, order, size, DEADLINE_S)
    expected = theirs.reshape(num, size)[order // size]
    ok = np.array_equal(arena.reshape(num, size), expected)
    np.invert(arena, out=arena)
    await transfer.write(peer, local[::2], order[::2], size, DEADLINE_S)
    expected[::2] = ~expected[::2]
    arena[:] = 0
    await transfer.read(peer, local, order, size, DEADLINE_S)
    if not (ok and np.array_equal(arena.reshape(num, size), expected)):
        raise SystemExit("wrong bytes: nothing was measured")


async def measure_case(
    transfer: NixlTransfer, peer: str, arena: Arena, size: int, num: int, repeats: int
) -> dict[str, Any]:
    """One block size and count; remote blocks are shuffled, so that none of them merge."""
    local = np.arange(num) * size
    room = len(arena) // size
    remote = np.random.default_rng(9).permutation(room)[:num] * size
    source = arena.copy()

    async def copy() -> None:
        for to, origin in zip(local.tolist(), remote.tolist(), strict=True):
            np.copyto(arena[to : to + size], source[origin : origin + size])

    async def read() -> None:
        await transfer.read(peer, local, remote, size, DEADLINE_S)

    async def write() -> None:
        await transfer.write(peer, local, remote, size, DEADLINE_S)

    row: dict[str, Any] = {"block_num_bytes": size, "num_blocks": num}
    for name, move in (("memcpy", copy), ("read", read), ("write", write)):
        duration_s = await median_s(move, repeats)
        row[f"{name}_us"] = round(duration_s * 1e6, 1)
        row[f"{name}_gb_per_s"] = round(num * size / duration_s / 1e9, 3)
    row["read_to_memcpy"] = round(row["read_gb_per_s"] / row["memcpy_gb_per_s"], 3)
    row["write_to_memcpy"] = round(row["write_gb_per_s"] / row["memcpy_gb_per_s"], 3)
    return row


async def median_s(move: Callable[[], Awaitable[None]], repeats: int) -> float:
    """Median seconds of `repeats` runs after one that warms up."""
    await move()
    durations: list[float] = []
    for _ in range(repeats):
        started_at = time.perf_counter()
        await move()
        durations.append(time.perf_counter() - started_at)
    return statistics.median(durations)


def report(rows: list[dict[str, Any]], out: Path | None, repeats: int, nixl: str) -> None:
    """Prints the table; writes the JSON when a path is given."""
    print(f"{'block':>10} {'count':>6} {'memcpy GB/s':>12} {'READ GB/s':>10} {'WRITE GB/s':>11}")
    for row in rows:
        print(
            f"{row['block_num_bytes'] // 1024:>7} Ki {row['num_blocks']:>6} "
            f"{row['memcpy_gb_per_s']:>12.2f} {row['read_gb_per_s']:>10.2f} "
            f"{row['write_gb_per_s']:>11.2f}   READ {row['read_us']:.0f} us"
        )
    if out is None:
        return
    result = {
        "what": "NIXL READ and WRITE between two processes on one host, against numpy.copyto",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {cpu_name()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "nixl": nixl,
        "load_average_1min": round(os.getloadavg()[0], 1),
        "repeats": repeats,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def cpu_name() -> str:
    """The processor's model name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def main() -> None:
    """Runs the benchmark, or, with --own, the child."""
    parser = argparse.ArgumentParser(description="NIXL bandwidth against memcpy")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--arena-mib", type=int, default=256, help="bytes each side registers")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs per figure")
    parser.add_argument("--own", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.own is not None:
        asyncio.run(own_arena(arguments.own))
        return
    child, agent = start_owner(arguments.arena_mib << 20)
    with child:
        rows = asyncio.run(measure(agent, arguments.repeats))
    report(rows, arguments.out, arguments.repeats, agent.nixl_version)


if __name__ == "__main__":
    main()
