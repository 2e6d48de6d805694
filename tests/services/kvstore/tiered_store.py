"""A store of few slots with a real directory: index, arena, files and mover, without the wire.

With host slots its arena stands for a GPU's memory: everything goes by copies of bytes then.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from kv.digest import block_digest
from mesh.folds import Folds
from mesh.telemetry import Telemetry
from services.kvstore.arena import DramArena, SlotAllocator
from services.kvstore.block import Leased, LeaseOutcome
from services.kvstore.disk_copies import BounceWindow, DirectWindow
from services.kvstore.disk_files import DiskFiles
from services.kvstore.disk_format import Header, file_num_bytes
from services.kvstore.host_copies import HostCopies
from services.kvstore.index import BlockIndex
from services.kvstore.lower_tier import LowerTier
from services.kvstore.mover import Mover
from tests.services.kvstore.plain_engine import PlainEngine

SIZE = 8192
PATIENCE_S = 20.0


class GatedFiles(DiskFiles):
    """Files whose reads wait at a gate that tests may shut, and whose writes may fail."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.gate = threading.Event()
        self.gate.set()
        self.num_reads = 0
        self.write_error: OSError | None = None

    def read(self, header: Header, data: memoryview) -> None:
        self.num_reads += 1
        assert self.gate.wait(PATIENCE_S)
        super().read(header, data)

    def write(self, header: Header, data: memoryview) -> None:
        if self.write_error is not None:
            raise self.write_error
        super().write(header, data)


class TieredStore:
    """Build in a running loop with `start`; `close` checks the books."""

    def __init__(self, directory: Path, num_slots: int, num_files: int, num_host: int) -> None:
        self.now = 0.0
        self.arena = DramArena(num_slots * SIZE)
        self.index = BlockIndex(
            SlotAllocator(num_slots * SIZE),
            clock=lambda: self.now,
            host_num_bytes=num_host * SIZE,
            disk_num_bytes=num_files * file_num_bytes(SIZE),
        )
        self.files = GatedFiles(directory)
        self.engine = PlainEngine(self.arena)
        self.host = DramArena(num_host * SIZE) if num_host else None
        self.reader = InMemoryMetricReader()
        meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.mover = Mover(
            index=self.index,
            arena_num_bytes=self.arena.num_bytes,
            telemetry=Telemetry(None, meters.get_meter("test"), Folds()),
            clock=lambda: self.now,
        )

    @classmethod
    async def start(
        cls, directory: Path, num_slots: int = 8, num_files: int = 64, num_host: int = 0
    ) -> TieredStore:
        store = cls(directory, num_slots, num_files, num_host)
        window = DirectWindow(store.arena.memory)
        if store.host is not None:
            store.mover.add_host(HostCopies(store.engine, store.host.address))
            window = BounceWindow(store.engine)
        await store.mover.load_disk(store.files, window)
        return store

    @property
    def disk(self) -> LowerTier:
        assert self.index.lower.disk is not None
        return self.index.lower.disk

    @property
    def num_pending(self) -> int:
        return sum(tier.num_pending for tier in self.index.lower.all)

    async def close(self) -> None:
        self.files.gate.set()
        self.engine.gate.set()
        await self.mover.close()
        await asyncio.sleep(0)  # what the threads told last
        self.index.check()

    def put(self, names: str, *, is_private: bool = False) -> None:
        """Reserves, writes and seals one block a letter."""
        keys = keys_of(names)
        answers = self.index.reserve("w", keys, SIZE, ttl_s=60, is_private=is_private)
        ids = [answer.reservation_id for answer in answers]
        assert all(ids), [answer.outcome.name for answer in answers]
        for key, answer in zip(keys, answers, strict=True):
            self.slot(answer.offset)[:] = content_of(key)
        digests = [block_digest(memoryview(content_of(key))) for key in keys]
        assert all(self.index.seal("w", ids, digests))
        self.mover.wake()

    async def put_below(self, names: str) -> None:
        """Puts blocks and takes them out of memory when they are in all other tiers."""
        self.put(names)
        await self.until(lambda: not self.num_pending)
        assert self.index.evict(len(names)) == len(names)

    async def look_up(self, names: str, max_wait_s: float = PATIENCE_S) -> str:
        """Leases, compares every byte, releases; returns the letters found."""
        leased = await self.mover.lookup("r", keys_of(names), SIZE, ttl_s=60, max_wait_s=max_wait_s)
        return self.read(names, leased)

    def read(self, names: str, leased: Leased) -> str:
        for key, block in zip(keys_of(names), leased.blocks, strict=False):
            assert self.slot(block.offset) == content_of(key), "wrong bytes"
            assert block.digest == block_digest(memoryview(content_of(key)))
        held = self.index.release("r", leased.lease_id) is LeaseOutcome.HELD
        assert held is bool(leased.blocks)
        return names[: len(leased.blocks)]

    def slot(self, offset: int) -> memoryview:
        return memoryview(self.arena.memory)[offset : offset + SIZE]  # type: ignore[arg-type]

    def path(self, name: str) -> Path:
        return self.files.directory / f"{keys_of(name)[0].hex()}.kv"

    def on_disk(self, names: str) -> str:
        return "".join(name for name in names if self.path(name).exists())

    async def until(self, condition: Callable[[], object]) -> None:
        """Lets the loop and the threads run until a condition holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "never happened"
            await asyncio.sleep(0.001)

    def counted(self, name: str, tier: str = "disk") -> dict[str, int]:
        """A counter's values by its attribute that is not the tier."""
        totals: dict[str, int] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
                for point in metric.data.data_points if metric.name == name else ():
                    attributes = dict(point.attributes or {})
                    if attributes.pop("tier", tier) != tier:
                        continue
                    (label,) = attributes.values()
                    totals[str(label)] = getattr(point, "value", 0)
        return {label: total for label, total in totals.items() if total}


def keys_of(names: str) -> list[bytes]:
    return [hashlib.sha256(name.encode()).digest() for name in names]


def content_of(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(SIZE)
