"""How fast blocks come back from disk, against a plain sequential read of the same files.

Owns a store without the wire (index, arena, mover) in a directory on the disk to be measured.
Checks that promoted bytes are right before it times anything. Plain reads are dd's: one thread,
file after file, O_DIRECT, 4 MiB a call, into the same memory every time; a promotion reads, too,
and verifies every digest. The two take turns; caches are dropped before each where the kernel lets
us.
"""

from __future__ import annotations

import asyncio
import datetime
import errno
import json
import mmap
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.transfer_bandwidth import cpu_name
from kv.digest import block_digest
from mesh.telemetry import Telemetry
from services.kvstore.arena import DramArena, SlotAllocator
from services.kvstore.disk_copies import DirectWindow
from services.kvstore.disk_files import DiskFiles
from services.kvstore.disk_format import file_num_bytes
from services.kvstore.index import BlockIndex
from services.kvstore.mover import Mover

SIZES = (32 * 2**10, 256 * 2**10, 2**20, 4 * 2**20, 9 * 2**20)
CALL_NUM_BYTES = 4 * 2**20
PATIENCE_S = 300.0
PART = 4096  # blocks; fewer than the store's queue holds


class Bench:
    """One store whose memory holds the blocks twice, because promotions take half of it at most."""

    def __init__(self, directory: Path, size: int, num_blocks: int) -> None:
        self.size, self.num_blocks = size, num_blocks
        self._rng = np.random.default_rng(1)
        self.keys = [index.to_bytes(32, "big") for index in range(num_blocks)]
        self.arena = DramArena(2 * size * num_blocks)
        self.index = BlockIndex(
            SlotAllocator(self.arena.num_bytes),
            clock=time.monotonic,
            disk_num_bytes=num_blocks * file_num_bytes(size),
        )
        self.files = DiskFiles(directory)
        telemetry = Telemetry.off()
        self.mover = Mover(
            index=self.index, arena_num_bytes=self.arena.num_bytes, telemetry=telemetry
        )
        self.paths = [directory / f"{key.hex()}.kv" for key in self.keys]

    async def fill(self) -> float:
        """Seals blocks, PART at a time, until all are on disk; returns bytes per second written."""
        await self.mover.load_disk(self.files, DirectWindow(self.arena.memory))
        parts = [self.keys[first : first + PART] for first in range(0, self.num_blocks, PART)]
        duration_s = sum([await self._put(part) for part in parts])
        assert self.index.counts().num_on_disk == self.num_blocks
        return self.num_blocks * self.size / duration_s

    async def _put(self, keys: list[bytes]) -> float:
        """Seals random blocks; returns the seconds until they are on disk."""
        answers = self.index.reserve("w", keys, self.size, ttl_s=PATIENCE_S)
        digests: list[int] = []
        for answer in answers:
            slot = self.slot(answer.offset)
            slot[:] = self._rng.bytes(self.size)
            digests.append(block_digest(slot))
        ids = [answer.reservation_id for answer in answers]
        assert all(self.index.seal("w", ids, digests))
        started_at = time.perf_counter()
        self.mover.wake()
        await self._until_written()
        return time.perf_counter() - started_at

    async def _until_written(self) -> None:
        disk = self.index.lower.disk
        assert disk is not None
        num_pending = disk.num_pending
        while num_pending:
            await asyncio.sleep(0.001)
            num_pending = disk.num_pending

    async def promote(self, *, check: bool = False) -> float:
        """Empties memory, looks all blocks up; returns bytes per second."""
        assert self.index.evict(self.num_blocks) == self.num_blocks
        drop_caches()
        started_at = time.perf_counter()
        leased = await self.mover.lookup(
            "r", self.keys, self.size, ttl_s=PATIENCE_S, max_wait_s=PATIENCE_S
        )
        duration_s = time.perf_counter() - started_at
        assert len(leased.offsets) == self.num_blocks, "a block was lost"
        for block in leased.blocks if check else ():
            if block_digest(self.slot(block.offset)) != block.digest:
                raise SystemExit("wrong bytes: nothing was measured")
        self.index.release("r", leased.lease_id)
        return self.num_blocks * self.size / duration_s

    def slot(self, offset: int) -> memoryview:
        """A slot's bytes."""
        return memoryview(self.arena.memory)[offset : offset + self.size]  # pyright: ignore[reportArgumentType]


def read_plainly(paths: Sequence[Path], num_bytes: int) -> float:
    """Reads whole files one after the other as dd does; returns block bytes per second."""
    drop_caches()
    room = memoryview(mmap.mmap(-1, CALL_NUM_BYTES))
    room[:] = bytes(CALL_NUM_BYTES)
    started_at = time.perf_counter()
    for path in paths:
        file = _open(path)
        offset = 0
        while length := os.preadv(file, [room], offset):
            offset += length
        os.close(file)
    return len(paths) * num_bytes / (time.perf_counter() - started_at)


def _open(path: Path) -> int:
    """Past the page cache where the file system can."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY)


def drop_caches() -> bool:
    """Empties the page cache; False where that is not permitted."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


async def measure(directory: Path, size: int, total: int, repeats: int) -> dict[str, Any]:
    """One block size: medians of turns."""
    bench = Bench(directory, size, max(8, total // size))
    demoted = await bench.fill()
    await bench.promote(check=True)
    plain: list[float] = []
    promoted: list[float] = []
    for _ in range(repeats):
        plain.append(await asyncio.to_thread(read_plainly, bench.paths, size))
        promoted.append(await bench.promote())
    await bench.mover.close()
    ratios = [ours / dd for ours, dd in zip(promoted, plain, strict=True)]
    row = {
        "block_num_bytes": size,
        "num_blocks": bench.num_blocks,
        "demote_gb_per_s": round(demoted / 1e9, 3),
        "plain_read_gb_per_s": round(statistics.median(plain) / 1e9, 3),
        "promote_gb_per_s": round(statistics.median(promoted) / 1e9, 3),
        "promote_to_plain": round(statistics.median(ratios), 3),
        "promote_to_plain_min": round(min(ratios), 3),
        "promote_to_plain_max": round(max(ratios), 3),
    }
    print(json.dumps(row), flush=True)
    return row


def run(parent: Path, total: int, repeats: int) -> dict[str, Any]:
    """All block sizes, each in a fresh directory below `parent`."""
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            rows.append(asyncio.run(measure(Path(folder), size, total, repeats)))
    return {
        "what": "blocks promoted from disk (read and verified) against plain sequential reads of "
        "the same files: one thread, O_DIRECT, 4 MiB a call; medians of turns",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {cpu_name()}, shared with other work",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "caches_dropped": drop_caches(),
        "load_average_1min": round(os.getloadavg()[0], 1),
        "repeats": repeats,
        "rows": rows,
    }
