"""`python -m services.kvstore`: wires the kvstore process. Never imports torch."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import time

from kv.nixl_transfer import NixlTransfer
from mesh.logs import setup_logging
from mesh.process import (
    announce_ready,
    new_incarnation,
    num_fds,
    rss_num_bytes,
    run_service,
    settle_heap,
    task_count,
)
from mesh.server import ServiceServer
from mesh.settings import parse_settings
from mesh.status import StatusServicer
from mesh.telemetry import Telemetry
from protos import kvstore_pb2_grpc, status_pb2, status_pb2_grpc
from services.kvstore.arena import SlotAllocator
from services.kvstore.callers import CallerTable
from services.kvstore.carrier import SWITCH_INTERVAL_S
from services.kvstore.index import BlockIndex
from services.kvstore.mover import Mover
from services.kvstore.places import Places
from services.kvstore.servicer import KvStoreServicer
from services.kvstore.settings import KvStoreSettings

ROLE = "kvstore"
_DRAIN_POLL_S = 0.05
log = logging.getLogger("kvmesh.kvstore")


class KvStore:
    """The process: places, slots, index, NIXL agent, server. `run` lives until stop is set."""

    def __init__(self, settings: KvStoreSettings) -> None:
        self._settings = settings
        self._incarnation = new_incarnation()
        self._places = Places(settings)
        self._arena = self._places.arena
        self._slots = SlotAllocator(self._arena.num_bytes)
        self._index = BlockIndex(
            self._slots,
            clock=time.monotonic,
            private_ttl_s=settings.private_ttl_s,
            quarantine_s=settings.quarantine_s,
            first_id=1 + secrets.randbits(32),
            host_num_bytes=settings.host_num_bytes,
            disk_num_bytes=settings.disk_num_bytes,
            tenant_num_bytes=settings.tenant_num_bytes,
            pinned_share=settings.max_pinned,
            num_changes=settings.watch_events,
        )
        self._mover: Mover | None = None
        self._callers = CallerTable(clock=time.monotonic)
        self._telemetry = Telemetry.start(
            role=ROLE,
            incarnation=self._incarnation,
            settings=settings,
        )
        self._telemetry.observe("kv_blocks", self._observe_blocks)
        self._telemetry.observe("kv_evictions", self._observe_evictions)
        self._telemetry.observe("kv_leases_expired", self._observe_expired)
        self._address = ""
        self._ready = False
        self._started_at = time.monotonic()

    async def run(self, stop: asyncio.Event) -> None:
        """Registers the arena, serves, drains, closes."""
        transfer = NixlTransfer.create(
            role=ROLE,
            incarnation=self._incarnation,
            arena=(self._arena.address, self._arena.num_bytes),
            device_id=self._arena.device_id,
            on_thread_start=self._arena.make_current,
            loop=asyncio.get_running_loop(),
        )
        self._mover = await self._places.open_mover(self._index, self._telemetry)
        servicer = KvStoreServicer(
            index=self._index,
            callers=self._callers,
            transfer=transfer,
            telemetry=self._telemetry,
            mover=self._mover,
            max_watchers=self._settings.max_watchers,
        )
        sweep = asyncio.create_task(self._sweep(servicer), name="sweep")
        sweep.add_done_callback(lambda _: stop.set())
        try:
            await self._serve(servicer, stop)
        finally:
            if self._mover is not None:
                await self._mover.close()
            transfer.close()
            self._telemetry.close()
            self._places.close()
        sweep.cancel()
        await asyncio.wait([sweep])
        if not sweep.cancelled():
            sweep.result()

    async def _serve(self, servicer: KvStoreServicer, stop: asyncio.Event) -> None:
        settings = self._settings
        server = ServiceServer(host=settings.host, port=settings.port, telemetry=self._telemetry)
        add_store = kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server
        server.add(add_store, servicer, "kvmesh.v1.KvStoreService")
        add_status = status_pb2_grpc.add_StatusServiceServicer_to_server
        server.add(add_status, StatusServicer(self._status), "kvmesh.v1.StatusService")
        port = await server.start()
        self._address = f"{settings.host}:{port}"
        self._ready = True
        server.set_ready(True)
        settle_heap()
        announce_ready(role=ROLE, address=self._address, incarnation=self._incarnation)
        log.info(
            "serving %s bytes of %s on %s", self._arena.num_bytes, self._arena.tier, self._address
        )
        await stop.wait()
        self._ready = False
        server.set_ready(False)
        servicer.drain()
        await self._drain()
        await server.stop(1.0)

    async def _drain(self) -> None:
        """Waits until nobody reads or writes, at most drain_s seconds; the rest is a lost cache."""
        deadline = time.monotonic() + self._settings.drain_s
        is_busy = self._is_busy()
        while is_busy and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
            is_busy = self._is_busy()

    def _is_busy(self) -> bool:
        counts, disk = self._index.counts(), self._index.lower.disk
        num_pending = disk.num_pending if disk else 0
        return bool(counts.num_leases or counts.num_reserved or num_pending)

    async def _sweep(self, servicer: KvStoreServicer) -> None:
        """Expires what nobody asks about, so that counts and slots come back by themselves."""
        while True:
            await asyncio.sleep(self._settings.sweep_s)
            self._index.expire()
            await servicer.expire()
            if self._mover is not None:
                self._mover.wake()

    def _status(self) -> status_pb2.InstanceStatus:
        self._index.expire()
        counts = self._index.counts()
        return status_pb2.InstanceStatus(
            role=status_pb2.ROLE_KVSTORE,
            address=self._address,
            incarnation=self._incarnation,
            ready=self._ready,
            detail=f"{len(self._callers)} workers connected{self._tiers_detail()}",
            counts=status_pb2.Counts(
                num_blocks=self._slots.capacity,
                num_blocks_used=counts.num_sealed + counts.num_reserved + counts.num_promoting,
                num_blocks_sealed=counts.num_sealed,
                num_blocks_quarantined=counts.num_quarantined + counts.num_dropped,
                num_blocks_private=counts.num_private,
                num_blocks_in_host=counts.num_in_host,
                num_blocks_on_disk=counts.num_on_disk,
                num_leases=counts.num_leases,
                num_pins=counts.num_pins,
                num_reservations=counts.num_reserved,
                num_tasks=task_count(),
                num_fds=num_fds(),
                rss_num_bytes=rss_num_bytes(),
            ),
            uptime_s=time.monotonic() - self._started_at,
        )

    def _tiers_detail(self) -> str:
        lower = self._index.lower
        places = ((lower.host, "pinned DRAM"), (lower.disk, str(self._settings.disk_dir)))
        return "".join(
            f"; {tier.name}: {tier.num_bytes} of {tier.capacity_num_bytes} bytes in {place}"
            for tier, place in places
            if tier is not None
        )

    def _observe_blocks(self) -> list[tuple[int, dict[str, str]]]:
        counts = self._index.counts()
        states = {
            "sealed": counts.num_sealed,
            "reserved": counts.num_reserved,
            "private": counts.num_private,
            "quarantined": counts.num_quarantined,
            "dropped": counts.num_dropped,
            "promoting": counts.num_promoting,
        }
        numbers = [(n, {"state": state, "tier": "memory"}) for state, n in states.items()]
        for lower in self._index.lower.all:
            numbers.append((lower.num_blocks, {"state": "sealed", "tier": lower.name}))
        return numbers

    def _observe_evictions(self) -> list[tuple[int, dict[str, str]]]:
        causes = self._index.counts().num_evicted
        numbers = [(n, {"tier": "memory", "cause": cause}) for cause, n in causes.items()]
        for lower in self._index.lower.all:
            numbers.append((lower.num_evicted, {"tier": lower.name, "cause": "room"}))
        return numbers

    def _observe_expired(self) -> list[tuple[int, dict[str, str]]]:
        expired = self._index.counts().num_expired
        return [(n, {"promise": promise}) for promise, n in expired.items()]


def main() -> None:
    """Parses flags and runs until told to stop."""
    settings = parse_settings(KvStoreSettings, "python -m services.kvstore")
    setup_logging(settings.log_format, settings.log_level, ROLE)
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    async def body(stop: asyncio.Event) -> None:
        await KvStore(settings).run(stop)

    run_service(body, die_with_parent=settings.die_with_parent)


if __name__ == "__main__":
    main()
