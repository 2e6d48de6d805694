"""How fast blocks leave a GPU's memory for DRAM and come back, against one plain copy of as much.

Owns a store without the wire whose arena is a GPU's memory. Checks that promoted bytes are right
before it times anything, and again at the end. Plain copies are one cuMemcpy*Async of all bytes and
the wait for it, between the same kinds of memory; the two take turns. A promotion is a whole
lookup, a demotion the time from Seal until the books have every copy.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kvstore_tiers_disk import drop_caches, read_plainly
from benchmarks.transfer_bandwidth import cpu_name
from kv.digest import block_digest
from mesh.telemetry import Telemetry
from services.kvstore.arena import SlotAllocator
from services.kvstore.carrier import SWITCH_INTERVAL_S
from services.kvstore.copies import Span
from services.kvstore.cuda_copies import CudaEngine
from services.kvstore.cuda_driver import device_name
from services.kvstore.disk_copies import BounceWindow
from services.kvstore.disk_files import DiskFiles
from services.kvstore.disk_format import file_num_bytes
from services.kvstore.hbm import HbmArena
from services.kvstore.host_copies import HostCopies
from services.kvstore.index import BlockIndex
from services.kvstore.mover import Mover
from services.kvstore.pinned import PinnedMemory

SIZE = 9 * 2**20  # of a block of 64 tokens of an 8B model
NUM_ON_DISK = 64
DISK_REPEATS = 3
PATIENCE_S = 300.0


class Bench:
    """An arena that holds the blocks twice (promotions take half of it at most), and one tier."""

    def __init__(self, arena: HbmArena, engine: CudaEngine, num_blocks: int) -> None:
        self.arena, self.engine, self.num_blocks = arena, engine, num_blocks
        self.num_bytes = num_blocks * SIZE
        self.keys = [number.to_bytes(32, "big") for number in range(num_blocks)]
        self._content = np.random.default_rng(1).integers(0, 2**63, SIZE // 8, np.uint64)
        self._digests = [block_digest(self._content_of(n)) for n in range(num_blocks)]

    def open(self, *, host_num_bytes: int = 0, disk_num_bytes: int = 0) -> None:
        """A store without blocks."""
        self.index = BlockIndex(
            SlotAllocator(self.arena.num_bytes),
            clock=time.monotonic,
            host_num_bytes=host_num_bytes,
            disk_num_bytes=disk_num_bytes,
        )
        telemetry = Telemetry.off()
        self.mover = Mover(
            index=self.index, arena_num_bytes=self.arena.num_bytes, telemetry=telemetry
        )

    async def demote(self) -> float:
        """Drops and seals all blocks; returns bytes per second until the tier has them."""
        self.index.drop_corrupt(self.keys)
        answers = self.index.reserve("w", self.keys, SIZE, ttl_s=PATIENCE_S)
        for number, answer in enumerate(answers):
            address = np.frombuffer(self._content_of(number), np.uint8).ctypes.data
            self.engine.write([Span(answer.offset, int(address), SIZE)])
        ids = [answer.reservation_id for answer in answers]
        started_at = time.perf_counter()
        assert all(self.index.seal("w", ids, self._digests))
        self.mover.wake()
        (tier,) = self.index.lower.all
        num_pending = tier.num_pending
        while num_pending:
            await asyncio.sleep(0.0002)
            num_pending = tier.num_pending
        duration_s = time.perf_counter() - started_at
        assert tier.num_blocks == self.num_blocks
        return self.num_bytes / duration_s

    async def promote(self, *, check: bool = False) -> float:
        """Empties the arena, looks all blocks up; returns bytes per second."""
        assert self.index.evict(self.num_blocks) == self.num_blocks
        drop_caches()
        started_at = time.perf_counter()
        leased = await self.mover.lookup(
            "r", self.keys, SIZE, ttl_s=PATIENCE_S, max_wait_s=PATIENCE_S
        )
        duration_s = time.perf_counter() - started_at
        assert len(leased.offsets) == self.num_blocks, "a block was lost"
        back = np.zeros(SIZE, np.uint8)
        for block in leased.blocks if check else ():
            self.engine.read([Span(block.offset, int(back.ctypes.data), SIZE)])
            if block_digest(memoryview(back)) != block.digest:  # pyright: ignore[reportArgumentType]
                raise SystemExit("wrong bytes: nothing was measured")
        self.index.release("r", leased.lease_id)
        return self.num_bytes / duration_s

    def copy_plainly(self, copy: Callable[[list[Span]], None], address: int) -> float:
        """One copy between host memory and the arena's half that no block is in."""
        started_at = time.perf_counter()
        copy([Span(self.num_bytes, address, self.num_bytes)])
        return self.num_bytes / (time.perf_counter() - started_at)

    def _content_of(self, number: int) -> memoryview:
        self._content[0] = number
        return memoryview(self._content).cast("B")  # pyright: ignore[reportArgumentType]


async def measure_host(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """Demotion to and promotion from pinned DRAM."""
    pinned = PinnedMemory(bench.arena, bench.num_bytes)
    scratch = PinnedMemory(bench.arena, bench.num_bytes)
    bench.open(host_num_bytes=bench.num_bytes)
    bench.mover.add_host(HostCopies(bench.engine, pinned.address))
    await bench.demote()
    await bench.promote(check=True)
    turns: dict[str, list[float]] = {name: [] for name in ("down", "up", "dtoh", "htod")}
    for _ in range(repeats):
        turns["dtoh"].append(bench.copy_plainly(bench.engine.read, scratch.address))
        turns["down"].append(await bench.demote())
        turns["htod"].append(bench.copy_plainly(bench.engine.write, scratch.address))
        turns["up"].append(await bench.promote())
    await bench.promote(check=True)
    await bench.mover.close()
    pinned.close()
    scratch.close()
    return [
        _row("HBM to DRAM", bench, turns["down"], turns["dtoh"]),
        _row("DRAM to HBM", bench, turns["up"], turns["htod"]),
    ]


async def measure_disk(bench: Bench, directory: Path) -> list[dict[str, Any]]:
    """Demotion to and promotion from files; plain reads are of the same files, one by one."""
    bench.open(disk_num_bytes=bench.num_blocks * file_num_bytes(SIZE))
    await bench.mover.load_disk(DiskFiles(directory), BounceWindow(bench.engine))
    paths = [directory / f"{key.hex()}.kv" for key in bench.keys]
    down = [await bench.demote()]
    await bench.promote(check=True)
    plain: list[float] = []
    up: list[float] = []
    for _ in range(DISK_REPEATS):
        plain.append(await asyncio.to_thread(read_plainly, paths, SIZE))
        up.append(await bench.promote())
    await bench.mover.close()
    return [
        _row("HBM to disk", bench, down, []),
        _row("disk to HBM, verified", bench, up, plain),
    ]


def _row(what: str, bench: Bench, ours: list[float], plain: list[float]) -> dict[str, Any]:
    median = statistics.median(ours)
    row: dict[str, Any] = {
        "what": what,
        "num_blocks": bench.num_blocks,
        "gb_per_s": round(median / 1e9, 2),
        "gb_per_s_min": round(min(ours) / 1e9, 2),
        "gb_per_s_max": round(max(ours) / 1e9, 2),
    }
    if plain:
        row["plain_gb_per_s"] = round(statistics.median(plain) / 1e9, 2)
        row["share_of_plain"] = round(median / statistics.median(plain), 3)
    return row


def run(parent: Path, num_blocks: int, repeats: int) -> dict[str, Any]:
    """All tiers behind the first GPU; prints a line each."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    arena = HbmArena(2 * num_blocks * SIZE)
    engine = CudaEngine(arena)
    rows = asyncio.run(measure_host(Bench(arena, engine, num_blocks), repeats))
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        bench = Bench(arena, engine, min(num_blocks, NUM_ON_DISK))
        rows += asyncio.run(measure_disk(bench, Path(folder)))
    name = device_name(arena.driver, arena.device_id)
    engine.close()
    arena.close()
    print(f"{'blocks of 9 MiB':24}{'GB/s':>8}{'min':>8}{'max':>8}{'plain':>8}{'share':>8}")
    for row in rows:
        numbers = (row["gb_per_s"], row["gb_per_s_min"], row["gb_per_s_max"])
        cells = (*numbers, row.get("plain_gb_per_s", ""), row.get("share_of_plain", ""))
        print(f"{row['what']:24}" + "".join(f"{cell!s:>8}" for cell in cells), flush=True)
    return {
        "what": "blocks of 9 MiB copied from a GPU's memory to lower tiers and back, medians; "
        "plain: one cuMemcpy*Async of all bytes, for the disk O_DIRECT reads of the same files by "
        "one thread",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": name,
        "machine": f"{platform.machine()}, {cpu_name()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "block_num_bytes": SIZE,
        "caches_dropped": drop_caches(),
        "repeats": repeats,
        "rows": rows,
    }
