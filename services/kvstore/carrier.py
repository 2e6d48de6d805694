"""The threads of one lower tier, which copy what its books tell.

Owns the threads and the bounds on what is under way. Nothing blocks the event loop. Whatever the
tier does (full, unreadable, wrong bytes, silence), it is counted and the store goes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mesh.telemetry import Telemetry
from services.kvstore.copies import Copies, CopyFailed, UnusableBlock
from services.kvstore.lower_tier import LowerTier, Move
from services.kvstore.tiers import LowerTiers, Promoted

WRITE_SHARE = 8  # blocks being copied are held: at most this part of the arena
_PAUSE_S = 5.0  # after a failed write
_STUCK_S = 5.0  # a read that takes this long: the tier hangs, and lookups do not wait for it
# A tier's threads need the interpreter between copies: with Python's 5 ms the bus waits for them.
SWITCH_INTERVAL_S = 0.0001
log = logging.getLogger("kvmesh.kvstore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How much a tier is asked for at once."""

    num_readers: int  # threads
    num_writers: int
    call_num_bytes: int  # of the blocks that one call copies; 0 is one block
    read_num_bytes: int  # of the blocks that one thread reads before it tells
    max_writes: int  # blocks


DISK_PACE = Pace(
    num_readers=4, num_writers=1, call_num_bytes=0, read_num_bytes=8 * 2**20, max_writes=32
)
# A thread prepares its copies while another's are under way, so that the bus is never idle.
HOST_PACE = Pace(
    num_readers=2,
    num_writers=2,
    call_num_bytes=64 * 2**20,
    read_num_bytes=64 * 2**20,
    max_writes=8192,
)


class Read:
    """Blocks that one thread reads, one after the other; `is_over` resolves when all have ended."""

    def __init__(self, moves: list[Move]) -> None:
        self.moves = moves
        self.arrived: list[Move] = []
        self.num_waiting = 0
        self.is_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_abandoned = False
        self.started_at = math.inf  # while it is queued
        self.future: Future[None] | None = None


class Carrier:
    """Demotions to and promotions from one tier. Runs on the event loop; `close` ends the threads.

    `on_change` is called when a copy has ended: there may be more to do, for other tiers, too.
    """

    def __init__(
        self,
        *,
        tier: LowerTier,
        lower: LowerTiers,
        copies: Copies,
        pace: Pace,
        arena_num_bytes: int,
        telemetry: Telemetry,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.tier = tier
        self._lower = lower
        self._copies = copies
        self._pace = pace
        self._write_limit = arena_num_bytes // WRITE_SHARE
        self._instruments = telemetry.instruments
        self._clock = clock
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._writers = ThreadPoolExecutor(pace.num_writers, f"kv-{tier.name}-write")
        self._readers = ThreadPoolExecutor(pace.num_readers, f"kv-{tier.name}-read")
        self._reads: dict[int, Read] = {}  # by row
        self._num_writes = self._write_num_bytes = 0
        self._paused_until = -math.inf
        self._num_skipped = 0

    def start(self, moves: Sequence[Move]) -> None:
        """Begins to read blocks."""
        for batch in _batches(moves, self._pace.read_num_bytes):
            read = Read(batch)
            self._reads.update(dict.fromkeys((move.row for move in batch), read))
            read.future = self._submit(self._readers, self._read_all, read)

    def read_of(self, row: int) -> Read | None:
        """The read under way that a block is part of."""
        return self._reads.get(row)

    def stop_waiting(self, read: Read) -> None:
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

    def wake(self) -> None:
        """Removes copies of blocks that went and starts making those that wait for it."""
        self._remove_copies()
        moves: list[Move] = []
        while self._may_write() and (move := self.tier.next_demotion()) is not None:
            self._num_writes += 1
            self._write_num_bytes += move.header.num_bytes
            moves.append(move)
        self._remove_copies()  # those that made room, first
        for batch in _batches(moves, self._pace.call_num_bytes):
            self._submit(self._writers, self._write, batch)
        if num_new := self.tier.num_skipped - self._num_skipped:
            self._num_skipped += num_new
            self._count("skipped", num_new)

    def is_stuck(self) -> bool:
        """Whether waiting for this tier is hopeless now."""
        oldest = self._clock() - _STUCK_S
        return any(read.started_at < oldest for read in set(self._reads.values()))

    async def close(self) -> None:
        """Waits for what the threads are doing; what is queued is dropped."""
        for pool in (self._readers, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._readers, self._writers):
            await asyncio.to_thread(pool.shutdown)
        self._copies.close()

    def _land(self, read: Read, outcomes: Sequence[Promoted]) -> None:
        """On the loop, when a thread is through with its blocks."""
        for move, outcome in zip(read.moves, outcomes, strict=True):
            del self._reads[move.row]
            self._lower.promoted(move, outcome)
            if outcome is Promoted.DONE:
                read.arrived.append(move)
        read.is_over.set_result(None)
        self._count("promoted", len(read.arrived))
        if not read.num_waiting:
            self._settle(read)
        self._on_change()

    def _settle(self, read: Read) -> None:
        for move in read.arrived:
            self._lower.settle(move)

    def _read_all(self, read: Read) -> None:
        """In a reader's thread; the slots are nobody else's until it has told."""
        read.started_at = self._clock()
        outcomes: list[Promoted] = []
        for moves in _batches(read.moves, self._pace.call_num_bytes):
            outcome = Promoted.ABANDONED if read.is_abandoned else self._read(moves)
            outcomes += [outcome] * len(moves)
        self._loop.call_soon_threadsafe(self._land, read, outcomes)

    def _read(self, moves: list[Move]) -> Promoted:
        try:
            self._copies.read(moves)
        except UnusableBlock as error:
            log.warning("%d blocks dropped: %s", len(moves), error)
            self._instruments.kv_verify_failures.add(len(moves), {"reason": error.reason})
            return Promoted.UNUSABLE
        return Promoted.DONE

    def _write(self, moves: list[Move]) -> None:
        """In a writer's thread; the slots are held until it has told."""
        error: CopyFailed | None = None
        try:
            self._copies.write(moves)
        except CopyFailed as failure:
            error = failure
        self._loop.call_soon_threadsafe(self._written, moves, error)

    def _written(self, moves: list[Move], error: CopyFailed | None) -> None:
        """On the loop, when writes have ended."""
        for move in moves:
            self._num_writes -= 1
            self._write_num_bytes -= move.header.num_bytes
            self.tier.demoted(move, is_written=error is None)
        if error is None:
            self._count("demoted", len(moves))
        else:
            self._pause(error)
        self._on_change()

    def _pause(self, error: CopyFailed) -> None:
        """A tier that takes no blocks is not asked again at once; the store goes on without."""
        self._instruments.kv_verify_failures.add(1, {"reason": error.reason})
        now = self._clock()
        if now >= self._paused_until:
            log.warning("%s; no block is copied to %s now", error, self.tier.name)
        self._paused_until = now + _PAUSE_S

    def _may_write(self) -> bool:
        is_paused = self._clock() < self._paused_until
        is_room = not self._num_writes or self._write_num_bytes < self._write_limit
        return is_room and self._num_writes < self._pace.max_writes and not is_paused

    def _remove_copies(self) -> None:
        for key in self.tier.take_removed():
            self._submit(self._writers, self._copies.remove, key)

    def _count(self, move: str, num_blocks: int) -> None:
        attributes = {"move": move, "tier": self.tier.name}
        self._instruments.kv_tier_blocks.add(num_blocks, attributes)

    def _submit(
        self, pool: ThreadPoolExecutor, function: Callable[..., None], *args: object
    ) -> Future[None]:
        future = pool.submit(function, *args)
        future.add_done_callback(_tell_failure)
        return future


def _tell_failure(future: Future[None]) -> None:
    """A tier's trouble is dealt with where it happens; anything else is a bug and must be seen."""
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("a tier's thread failed", exc_info=error)


def _batches(moves: Sequence[Move], num_bytes: int) -> Iterator[list[Move]]:
    """Consecutive moves of one size, in groups of about num_bytes, at least one each."""
    batch: list[Move] = []
    total = 0
    for move in moves:
        if batch and total + move.header.num_bytes > num_bytes:
            yield batch
            batch, total = [], 0
        batch.append(move)
        total += move.header.num_bytes
    if batch:
        yield batch
