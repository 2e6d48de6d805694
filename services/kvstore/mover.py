"""Moves blocks between the arena and the disk, in threads, as the books of disk.py tell.

Owns the threads, the bounds on what is under way, and how long a lookup waits. Nothing blocks the
event loop. Whatever the disk does (full, unreadable, wrong bytes, silence), a lookup gets the
prefix that is in memory, and the rest is counted.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from mesh.telemetry import Telemetry
from services.kvstore.block import Leased
from services.kvstore.disk import Move, Promoted
from services.kvstore.disk_files import DiskFiles, UnusableBlock
from services.kvstore.index import BlockIndex

NUM_READERS = 4
MAX_WRITES = 32
_READ_NUM_BYTES = 8 * 2**20  # of the blocks that one thread reads before it tells
_WRITE_SHARE = 8  # blocks being written are held: at most this part of the arena
_PAUSE_S = 5.0  # after a failed write
_STUCK_S = 5.0  # a read that takes this long: the disk hangs, and lookups do not wait for it
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
log = logging.getLogger("kvmesh.kvstore")


class _Read:
    """Blocks that one thread reads, one after the other; `is_over` resolves when all have ended."""

    def __init__(self, moves: list[Move]) -> None:
        self.moves = moves
        self.arrived: list[Move] = []
        self.num_waiting = 0
        self.is_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_abandoned = False
        self.started_at = math.inf  # while it is queued
        self.future: Future[None] | None = None


class Mover:
    """Demotions and promotions of one index. Runs on the event loop; `close` ends the threads."""

    def __init__(
        self,
        *,
        index: BlockIndex,
        files: DiskFiles,
        memory: NDArray[np.uint8],
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._clock = clock
        self._disk = index.disk
        self._files = files
        self._memory = memoryview(memory)  # pyright: ignore[reportArgumentType]
        self._instruments = telemetry.instruments
        self._loop = asyncio.get_running_loop()
        self._writer = ThreadPoolExecutor(1, "kv-disk-write")
        self._readers = ThreadPoolExecutor(NUM_READERS, "kv-disk-read")
        self._reads: dict[int, _Read] = {}  # by row
        self._num_writes = self._write_num_bytes = 0
        self._paused_until = -math.inf
        self._is_closed = False
        self._num_skipped = 0

    async def load(self) -> None:
        """Fills the books with what a former life of the store left on disk. OSError."""
        found = await self._loop.run_in_executor(self._writer, self._files.scan)
        self._disk.load(found.headers)
        self._instruments.kv_verify_failures.add(found.num_dropped, {"reason": "disk_start"})
        log.info(
            "disk %s: %d blocks found, %d unusable files removed, %d foreign files left alone",
            self._files.directory, len(found.headers), found.num_dropped, found.num_foreign,
        )  # fmt: skip
        self.wake()

    async def lookup(
        self, owner: str, keys: Sequence[bytes], num_bytes: int, *, ttl_s: float, max_wait_s: float
    ) -> Leased:
        """As BlockIndex.lookup, after waiting max_wait_s at most for blocks that are on disk."""
        leased = self._index.lookup(owner, keys, num_bytes, ttl_s=ttl_s)
        num_found = len(leased.offsets)
        if num_found == len(keys) or max_wait_s <= 0 or self._is_stuck():
            return leased
        moves, awaited = self._disk.promote(keys[num_found:], num_bytes)
        for batch in _batches(moves):
            self._start(_Read(batch))
        reads = list(dict.fromkeys(self._reads[row] for row in awaited))
        if not reads:
            return leased
        for read in reads:
            read.num_waiting += 1
            read.is_abandoned = False
        try:
            await asyncio.wait([read.is_over for read in reads], timeout=max_wait_s)
            return self._index.lookup(owner, keys, num_bytes, ttl_s=ttl_s)
        finally:
            self._index.release(owner, leased.lease_id)
            for read in reads:
                self._stop_waiting(read)

    def wake(self) -> None:
        """Removes files of blocks that went and starts writing what waits for it."""
        if self._is_closed:
            return
        self._remove_files()
        while self._may_write():
            move = self._disk.next_demotion()
            self._remove_files()  # those that make room for it, first
            if move is None:
                break
            self._num_writes += 1
            self._write_num_bytes += move.header.num_bytes
            self._submit(self._writer, self._write, move)
        if num_new := self._disk.num_skipped - self._num_skipped:
            self._num_skipped += num_new
            self._instruments.kv_tier_blocks.add(num_new, {"move": "skipped"})

    async def close(self) -> None:
        """Waits for what the threads are doing; what is queued is dropped."""
        self._is_closed = True
        for pool in (self._readers, self._writer):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._readers, self._writer):
            await asyncio.to_thread(pool.shutdown)
        self._files.close()

    def _start(self, read: _Read) -> None:
        self._reads.update(dict.fromkeys((move.row for move in read.moves), read))
        read.future = self._submit(self._readers, self._read_all, read)

    def _stop_waiting(self, read: _Read) -> None:
        """Who waited has a lease by now, or has gone; a read that nobody waits for ends early."""
        read.num_waiting -= 1
        if read.num_waiting:
            return
        if read.is_over.done():
            self._settle(read)
            return
        read.is_abandoned = True
        assert read.future is not None
        if read.future.cancel():
            self._land(read, [Promoted.ABANDONED] * len(read.moves))

    def _land(self, read: _Read, outcomes: list[Promoted]) -> None:
        """On the loop, when a thread is through with its blocks."""
        for move, outcome in zip(read.moves, outcomes, strict=True):
            del self._reads[move.row]
            self._disk.promoted(move, outcome)
            if outcome is Promoted.DONE:
                read.arrived.append(move)
        read.is_over.set_result(None)
        self._instruments.kv_tier_blocks.add(len(read.arrived), {"move": "promoted"})
        if not read.num_waiting:
            self._settle(read)
        self.wake()

    def _settle(self, read: _Read) -> None:
        for move in read.arrived:
            self._disk.settle(move)

    def _read_all(self, read: _Read) -> None:
        """In a reader's thread; the slots are nobody else's until it has told."""
        read.started_at = self._clock()
        outcomes = [
            Promoted.ABANDONED if read.is_abandoned else self._read_one(move) for move in read.moves
        ]
        self._loop.call_soon_threadsafe(self._land, read, outcomes)

    def _read_one(self, move: Move) -> Promoted:
        try:
            self._files.read(move.header, self._slot(move))
        except UnusableBlock as error:
            log.warning("block dropped: %s", error)
            self._instruments.kv_verify_failures.add(1, {"reason": error.reason})
            return Promoted.UNUSABLE
        return Promoted.DONE

    def _write(self, move: Move) -> None:
        """In the writer's thread; the slot is held until it has told."""
        error: OSError | None = None
        try:
            self._files.write(move.header, self._slot(move))
        except OSError as failure:
            error = failure
        self._loop.call_soon_threadsafe(self._written, move, error)

    def _written(self, move: Move, error: OSError | None) -> None:
        """On the loop, when a write has ended."""
        self._num_writes -= 1
        self._write_num_bytes -= move.header.num_bytes
        self._disk.demoted(move, is_written=error is None)
        if error is None:
            self._instruments.kv_tier_blocks.add(1, {"move": "demoted"})
        else:
            self._pause(error)
        self.wake()

    def _pause(self, error: OSError) -> None:
        """A disk that takes no blocks is not asked again at once; the store goes on without."""
        reason = "disk_full" if error.errno in _DISK_FULL else "disk_write"
        self._instruments.kv_verify_failures.add(1, {"reason": reason})
        now = self._clock()
        if now >= self._paused_until:
            log.warning("disk %s: %s; no block is written there now", self._files.directory, error)
        self._paused_until = now + _PAUSE_S

    def _may_write(self) -> bool:
        is_paused = self._clock() < self._paused_until
        share = len(self._memory) // _WRITE_SHARE
        is_room = not self._num_writes or self._write_num_bytes < share
        return is_room and self._num_writes < MAX_WRITES and not is_paused

    def _is_stuck(self) -> bool:
        oldest = self._clock() - _STUCK_S
        return any(read.started_at < oldest for read in set(self._reads.values()))

    def _remove_files(self) -> None:
        for key in self._disk.take_removed():
            self._submit(self._writer, self._files.remove, key)

    def _submit(
        self, pool: ThreadPoolExecutor, function: Callable[..., None], *args: object
    ) -> Future[None]:
        future = pool.submit(function, *args)
        future.add_done_callback(_tell_failure)
        return future

    def _slot(self, move: Move) -> memoryview:
        return self._memory[move.offset : move.offset + move.header.num_bytes]


def _tell_failure(future: Future[None]) -> None:
    """Disk trouble is dealt with where it happens; anything else is a bug and must be seen."""
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("a disk thread failed", exc_info=error)


def _batches(moves: list[Move]) -> Iterator[list[Move]]:
    """Consecutive moves, in groups of about _READ_NUM_BYTES."""
    if moves:
        size = max(1, _READ_NUM_BYTES // moves[0].header.num_bytes)
        for first in range(0, len(moves), size):
            yield moves[first : first + size]
