"""A store of few slots with a real directory: index, arena, files and mover, without the wire."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from kv.digest import block_digest
from mesh.telemetry import Telemetry
from services.kvstore.arena import DramArena, SlotAllocator
from services.kvstore.block import Leased, LeaseOutcome
from services.kvstore.disk_files import DiskFiles
from services.kvstore.disk_format import Header, file_num_bytes
from services.kvstore.index import BlockIndex
from services.kvstore.mover import Mover

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

    def __init__(self, directory: Path, num_slots: int, num_files: int) -> None:
        self.now = 0.0
        self.arena = DramArena(num_slots * SIZE)
        self.index = BlockIndex(
            SlotAllocator(num_slots * SIZE),
            clock=lambda: self.now,
            disk_num_bytes=num_files * file_num_bytes(SIZE),
        )
        self.files = GatedFiles(directory)
        self.reader = InMemoryMetricReader()
        meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.mover = Mover(
            index=self.index,
            files=self.files,
            memory=self.arena.memory,
            telemetry=Telemetry(trace.NoOpTracer(), meters.get_meter("test")),
            clock=lambda: self.now,
        )

    @classmethod
    async def start(cls, directory: Path, num_slots: int = 8, num_files: int = 64) -> TieredStore:
        store = cls(directory, num_slots, num_files)
        await store.mover.load()
        return store

    async def close(self) -> None:
        self.files.gate.set()
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

    async def put_on_disk(self, names: str) -> None:
        """Puts blocks and takes them out of memory when they are on disk."""
        self.put(names)
        await self.until(lambda: not self.index.disk.num_pending)
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

    def counted(self, name: str) -> dict[str, int]:
        """A counter's values by its one attribute."""
        totals: dict[str, int] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
                for point in metric.data.data_points if metric.name == name else ():
                    (label,) = (point.attributes or {}).values()
                    totals[str(label)] = getattr(point, "value", 0)
        return {label: total for label, total in totals.items() if total}


def keys_of(names: str) -> list[bytes]:
    return [hashlib.sha256(name.encode()).digest() for name in names]


def content_of(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(SIZE)
