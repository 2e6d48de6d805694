"""Watch over real gRPC: what a watcher is told, how streams end, and a client that keeps up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest

from kv.transfer import Agent, Transfer
from mesh.errors import from_rpc_error
from mesh.kvstore_watch import StoreWatch
from mesh.server import ServiceServer
from mesh.telemetry import Telemetry
from protos import kvstore_pb2 as pb
from protos import kvstore_pb2_grpc
from services.kvstore.arena import SlotAllocator
from services.kvstore.callers import CallerTable
from services.kvstore.index import BlockIndex
from services.kvstore.servicer import KvStoreServicer

SIZE, NUM_SLOTS, PATIENCE_S = 4096, 64, 20.0
AGENT = Agent(
    name="kvstore-0",
    nixl_version="1",
    metadata=b"",
    arena_address=0,
    arena_num_bytes=NUM_SLOTS * SIZE,
    incarnation="s",
    host_id="h",
)
RESPONSE = pb.WatchResponse


class Named:
    """Stands for NIXL: as nobody fetches, the store only asks who it is."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent


class Store:
    """A served store that may begin another life at its address."""

    def __init__(self) -> None:
        self._num_lives = self._port = 0
        self._watches: list[asyncio.Task[None]] = []
        self._channels: list[grpc.aio.Channel] = []

    async def start(self, **options: Any) -> None:
        telemetry = Telemetry.off()
        self.index = BlockIndex(SlotAllocator(NUM_SLOTS * SIZE), clock=lambda: 0.0, **options)
        self._num_lives += 1
        self.servicer = KvStoreServicer(
            index=self.index,
            callers=CallerTable(clock=lambda: 0.0),
            transfer=cast(Transfer, Named(replace(AGENT, name=f"kvstore-{self._num_lives}"))),
            telemetry=telemetry,
            max_watchers=2,
        )
        self._server = ServiceServer(host="127.0.0.1", port=self._port, telemetry=telemetry)
        register = kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server
        self._server.add(register, self.servicer, "kvmesh.v1.KvStoreService")
        self._port = await self._server.start()

    async def stop(self) -> None:
        self.servicer.drain()
        await self._server.stop(0)
        self.index.check()

    def stub(self) -> Any:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._port}")
        self._channels.append(channel)
        return kvstore_pb2_grpc.KvStoreServiceStub(channel)

    def watch(self) -> StoreWatch:
        channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{self._port}", options=[("grpc.max_reconnect_backoff_ms", 200)]
        )
        self._channels.append(channel)
        watch = StoreWatch(address="store", channel=channel)
        self._watches.append(asyncio.ensure_future(watch.run()))
        return watch

    async def close(self) -> None:
        for task in self._watches:
            task.cancel()
        for channel in self._channels:
            await channel.close()
        await self.stop()

    def put(self, first: int, num_keys: int, *, is_private: bool = False) -> set[bytes]:
        keys = keys_of(first, num_keys)
        answers = self.index.reserve("w", keys, SIZE, ttl_s=10, is_private=is_private)
        assert all(self.index.seal("w", [a.reservation_id for a in answers], [0] * num_keys))
        return set(keys)


def keys_of(first: int, num_keys: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in range(first, first + num_keys)]


async def until(watch: StoreWatch, keys: set[bytes], life: str) -> None:
    """Waits until a watch is current with exactly these keys."""
    async with asyncio.timeout(PATIENCE_S):
        while not (watch.known.is_current and watch.known.life == life):
            await watch.changed()
        while set(watch.known) != keys:
            await watch.changed()


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    store = Store()
    await store.start()
    yield store
    await store.close()


async def take(call: Any, num_messages: int) -> list[pb.WatchResponse]:
    async with asyncio.timeout(PATIENCE_S):
        return [await call.read() for _ in range(num_messages)]


async def failure_of(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as raised:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await call.read()
    return from_rpc_error(raised.value)


async def test_a_stream_tells_all_keys_and_then_what_happens(store: Store) -> None:
    before = store.put(0, 3)
    store.put(50, 1, is_private=True)
    call = store.stub().Watch(pb.WatchRequest())
    reset, snapshot, current = await take(call, 3)
    assert [m.kind for m in (reset, snapshot, current)] == [
        RESPONSE.KIND_RESET, RESPONSE.KIND_SNAPSHOT, RESPONSE.KIND_CURRENT
    ]  # fmt: skip
    assert {m.life for m in (reset, snapshot, current)} == {"kvstore-1"}
    (change,) = snapshot.changes
    assert set(change.keys) == before and change.sequence == 0 and change.tier == pb.TIER_MEMORY
    store.put(10, 5)
    store.index.drop_corrupt(keys_of(0, 1))
    (message,) = await take(call, 1)
    sealed, evicted = message.changes
    assert (sealed.kind, sealed.sequence) == (pb.Change.KIND_SEALED, 4)
    assert list(sealed.keys) == keys_of(10, 5), "one change a call, not one a block"
    assert (evicted.kind, evicted.sequence) == (pb.Change.KIND_EVICTED, 9)
    assert message.next_sequence == 10
    call.cancel()


async def test_a_watcher_that_knows_the_life_is_told_only_what_is_new(store: Store) -> None:
    store.put(0, 3)
    request = pb.WatchRequest(life="kvstore-1", from_sequence=3)
    call = store.stub().Watch(request)
    current, changes = await take(call, 2)
    assert (current.kind, current.next_sequence) == (RESPONSE.KIND_CURRENT, 3)
    assert list(changes.changes[0].keys) == keys_of(2, 1)
    call.cancel()


@pytest.mark.parametrize("request_", [("kvstore-9", 3), ("kvstore-1", 99), ("kvstore-1", 0)])
async def test_another_life_or_number_begins_with_a_reset(
    store: Store, request_: tuple[str, int]
) -> None:
    store.put(0, 3)
    life, from_sequence = request_
    call = store.stub().Watch(pb.WatchRequest(life=life, from_sequence=from_sequence))
    (first,) = await take(call, 1)
    assert (first.kind, first.life) == (RESPONSE.KIND_RESET, "kvstore-1")
    call.cancel()


async def test_a_watcher_too_many_is_refused_until_one_goes(store: Store) -> None:
    calls = [store.stub().Watch(pb.WatchRequest()) for _ in range(2)]
    for call in calls:
        await take(call, 1)
    error = await failure_of(store.stub().Watch(pb.WatchRequest()))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.reason == "TOO_MANY_WATCHERS" and "2" in str(error)
    calls[0].cancel()
    deadline = time.monotonic() + PATIENCE_S
    while len(store.servicer._watchers) == 2:
        assert time.monotonic() < deadline, "a watcher that went still counts"
        await asyncio.sleep(0.001)
    await take(again := store.stub().Watch(pb.WatchRequest()), 1)
    again.cancel()
    calls[1].cancel()


async def test_a_drain_ends_streams_and_refuses_new_ones(store: Store) -> None:
    stub = store.stub()
    call = stub.Watch(pb.WatchRequest())
    await take(call, 2)
    store.servicer.drain()
    for each in (call, stub.Watch(pb.WatchRequest())):
        error = await failure_of(each)
        assert error.code is grpc.StatusCode.UNAVAILABLE and error.reason == "DRAINING"
    assert not len(store.servicer._watchers) and not store.index.journal.sleepers


async def test_a_long_life_is_named(store: Store) -> None:
    error = await failure_of(store.stub().Watch(pb.WatchRequest(life="x" * 257)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in error.violations] == ["life"] and "257" in str(error)


async def test_a_client_keeps_up_with_a_store_and_its_restart(store: Store) -> None:
    first = store.put(0, 20)
    watch = store.watch()
    await until(watch, first, "kvstore-1")
    second = store.put(20, 20)
    store.index.drop_corrupt(keys_of(0, 5))
    await until(watch, (first | second) - set(keys_of(0, 5)), "kvstore-1")
    await store.stop()
    async with asyncio.timeout(PATIENCE_S):
        while watch.known.is_current:
            await watch.changed()
    await store.start()
    await until(watch, store.put(40, 3), "kvstore-2")


async def test_a_client_that_fell_behind_is_told_everything_anew(store: Store) -> None:
    await store.stop()
    await store.start(num_changes=8)
    watch = store.watch()
    await until(watch, set(), "kvstore-2")
    for turn in range(5):  # without a pause: the stream cannot take them
        store.put(100 * turn, 40)
    keys = store.put(500, 40)
    await until(watch, keys | set(keys_of(400, 24)), "kvstore-2")


async def test_a_client_recovers_from_a_gap(store: Store) -> None:
    keys = store.put(0, 3)
    watch = store.watch()
    await until(watch, keys, "kvstore-1")
    watch.known.next_sequence -= 1
    more = store.put(3, 1)
    await until(watch, keys | more, "kvstore-1")
