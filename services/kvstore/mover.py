"""Lookups over all tiers: what is below the arena is brought back before a lease is granted.

Owns how long a lookup waits, and what moves when; the threads are a Carrier's for each lower tier.
Whatever those tiers do, a lookup gets the prefix that is in memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from mesh.telemetry import Telemetry
from services.kvstore.block import Leased
from services.kvstore.carrier import DISK_PACE, HOST_PACE, Carrier, Pace, Read
from services.kvstore.copies import Copies
from services.kvstore.disk_copies import DiskCopies, Window
from services.kvstore.disk_files import DiskFiles
from services.kvstore.index import BlockIndex
from services.kvstore.lower_tier import LowerTier

log = logging.getLogger("kvmesh.kvstore")


class Mover:
    """Demotions and promotions of one index. Runs on the event loop; `close` ends the threads.

    `add_host` and `load_disk` give it the tiers that the index has, in this order.
    """

    def __init__(
        self,
        *,
        index: BlockIndex,
        arena_num_bytes: int,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._arena_num_bytes = arena_num_bytes
        self._telemetry = telemetry
        self._clock = clock
        self._carriers: list[Carrier] = []
        self._is_closed = False

    def add_host(self, copies: Copies) -> None:
        """The tier in host memory."""
        self._add(self._index.lower.host, copies, HOST_PACE)

    async def load_disk(self, files: DiskFiles, window: Window) -> None:
        """The tier on disk, with what a former life of the store left there. OSError."""
        self._add(self._index.lower.disk, DiskCopies(files, window), DISK_PACE)
        found = await asyncio.to_thread(files.scan)
        self._index.lower.load(found.headers)
        failures = self._telemetry.instruments.kv_verify_failures
        failures.add(found.num_dropped, {"reason": "disk_start"})
        log.info(
            "disk %s: %d blocks found, %d unusable files removed, %d foreign files left alone",
            files.directory, len(found.headers), found.num_dropped, found.num_foreign,
        )  # fmt: skip
        self.wake()

    async def lookup(
        self,
        owner: str,
        keys: Sequence[bytes],
        num_bytes: int,
        *,
        ttl_s: float,
        max_wait_s: float,
        attempt: int = 0,
    ) -> Leased:
        """As BlockIndex.lookup, after waiting max_wait_s at most for blocks in lower tiers."""
        leased = self._index.lookup(owner, keys, num_bytes, ttl_s=ttl_s, attempt=attempt)
        num_found = len(leased.offsets)
        if num_found == len(keys) or max_wait_s <= 0:
            return leased
        reads = self._promote(keys[num_found:], num_bytes)
        if not reads:
            return leased
        for read in reads:
            read.num_waiting += 1
            read.is_abandoned = False
        try:
            await asyncio.wait([read.is_over for read in reads], timeout=max_wait_s)
            found = self._index.lookup(owner, keys, num_bytes, ttl_s=ttl_s, attempt=attempt)
            return replace(found, num_promoted=max(0, len(found.offsets) - num_found))
        finally:
            self._index.release(owner, leased.lease_id)
            for read, carrier in reads.items():
                carrier.stop_waiting(read)

    def wake(self) -> None:
        """Removes copies of blocks that went and starts copying what waits for it."""
        for carrier in self._carriers if not self._is_closed else ():
            carrier.wake()

    async def close(self) -> None:
        """Waits for what the threads are doing; what is queued is dropped."""
        self._is_closed = True
        for carrier in self._carriers:
            await carrier.close()

    def _add(self, tier: LowerTier | None, copies: Copies, pace: Pace) -> None:
        assert tier is not None, "the index has no such tier"
        carrier = Carrier(
            tier=tier,
            lower=self._index.lower,
            copies=copies,
            pace=pace,
            arena_num_bytes=self._arena_num_bytes,
            telemetry=self._telemetry,
            clock=self._clock,
            on_change=self.wake,
        )
        self._carriers.append(carrier)

    def _promote(self, keys: Sequence[bytes], num_bytes: int) -> dict[Read, Carrier]:
        """Starts what is to be read; all reads under way that the keys wait for."""
        usable = [carrier for carrier in self._carriers if not carrier.is_stuck()]
        tiers = [carrier.tier for carrier in usable]
        reads: dict[Read, Carrier] = {}
        for moves, awaited in self._index.lower.promote(keys, num_bytes, tiers):
            for carrier in usable:
                carrier.start([move for move in moves if move.tier is carrier.tier])
            reads.update(_reads_of(awaited, usable))
        return reads


def _reads_of(rows: Iterable[int], carriers: Sequence[Carrier]) -> Iterable[tuple[Read, Carrier]]:
    for row in rows:
        for carrier in carriers:
            read = carrier.read_of(row)
            if read is not None:
                yield read, carrier
