"""Fetch: the store WRITEs to readers, from the client's pull to the index's books."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from mesh import kvstore_fetch
from mesh.errors import InvalidArgument
from mesh.kvstore_agent import agent_to_wire
from protos import kvstore_pb2 as pb
from services.kvstore.servicer import KvStoreServicer
from tests.mesh.fake_kvstore import keys_of
from tests.mesh.fake_transfer import BLOCK, CopyTransfer
from tests.services.kvstore.fetching_store import NUM_BLOCKS, PATIENCE_S, FetchingStore

WRITTEN, EXPIRED, BROKEN = (
    pb.FetchResponse.OUTCOME_WRITTEN,
    pb.FetchResponse.OUTCOME_EXPIRED,
    pb.FetchResponse.OUTCOME_BROKEN,
)


@pytest.fixture
async def store(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FetchingStore]:
    monkeypatch.setattr(kvstore_fetch, "_LANDING_S", 0.0)
    made = FetchingStore()
    await made.start()
    yield made
    await made.close()


async def lease(store: FetchingStore) -> int:
    """A lease of the four blocks, as the worker would get it."""
    request = pb.LookupRequest(incarnation="worker", keys=keys_of(4), num_bytes=BLOCK, ttl_s=30.0)
    return (await store.servicer.Lookup(request, None)).lease_id


def request(lease_id: int, **fields: Any) -> pb.FetchRequest:
    values = {
        "incarnation": "worker",
        "local_offsets": [40 * BLOCK],
        "deadline_s": 5.0,
        "life": "store",
    }
    return pb.FetchRequest(lease_id=lease_id, **{**values, **fields})


async def release(store: FetchingStore, lease_id: int) -> None:
    request = pb.ReleaseRequest(
        incarnation="worker", lease_id=lease_id, life=store.transfer.agent.name
    )
    await store.servicer.Release(request, None)


async def test_a_pull_is_written_by_the_store(
    store: FetchingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(*_: Any) -> None:
        raise AssertionError("the worker read")

    monkeypatch.setattr(store.worker, "read", read)
    assert store.client.paths == {store.address: "write"}
    assert (await store.pull()).num_blocks == 4
    assert store.has_arrived() and not store.held
    assert store.transfer.peers == {"worker"}


async def test_a_forced_read_path_asks_the_store_for_nothing(
    store: FetchingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(*_: Any) -> None:
        raise AssertionError("the store was asked")

    monkeypatch.setattr(KvStoreServicer, "Fetch", fetch)
    (shard,) = store.client._members.shards.values()
    shard._wanted_path = "read"
    shard._lose("the test wants another path", is_path_broken=True)
    assert await store.client.until_up(PATIENCE_S)
    assert store.client.paths == {store.address: "read"}
    assert (await store.pull()).num_blocks == 4
    assert store.has_arrived()


async def test_a_late_fetch_holds_the_readers_blocks_until_the_path_was_cut(
    store: FetchingStore,
) -> None:
    store.network.hangs = True
    pull = asyncio.ensure_future(store.pull(deadline_s=1.2))
    assert (await pull).failures == ("timeout",)
    ((block_ids, settled),) = store.held
    assert block_ids == [40, 41, 42, 43] and not settled.done()
    store.network.hangs = False
    await asyncio.wait_for(settled, PATIENCE_S)
    assert await store.client.until_up(PATIENCE_S)
    assert (await store.pull()).num_blocks == 4


async def test_a_fetch_that_ends_after_its_reader_left_settles_by_its_answer(
    store: FetchingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open, asked = asyncio.Event(), asyncio.Event()
    write = store.transfer.write

    async def wait_and_write(*args: Any) -> None:
        asked.set()
        await is_open.wait()
        await write(*args)

    monkeypatch.setattr(store.transfer, "write", wait_and_write)
    pull = asyncio.ensure_future(store.pull())
    await asyncio.wait_for(asked.wait(), PATIENCE_S)
    pull.cancel()
    await asyncio.wait([pull])
    ((_, settled),) = store.held
    connection = store.client._members.shards[store.address]._connection
    await store.until(lambda: not store.index.counts().num_leases)  # given back by the pull's end
    assert store.index.evict(4) == 0, "slots under a WRITE were reused"
    assert not settled.done()
    is_open.set()
    await asyncio.wait_for(settled, PATIENCE_S)
    assert store.has_arrived()
    assert connection is not None and not connection.is_cut.is_set()
    await store.until(lambda: not store.index.leases.uses)
    assert store.index.evict(4) == 4


async def test_a_broken_write_is_a_broken_path(store: FetchingStore) -> None:
    store.network.fails = True
    assert (await store.pull()).failures == ("timeout",)
    ((_, settled),) = store.held
    store.network.fails = False
    await asyncio.wait_for(settled, PATIENCE_S)
    assert await store.client.until_up(PATIENCE_S)
    assert (await store.pull()).num_blocks == 4


async def test_a_lost_store_settles_when_the_next_life_is_connected(store: FetchingStore) -> None:
    store.network.hangs = True
    pull = asyncio.ensure_future(store.pull())
    await store.until(lambda: store.index.leases.uses)
    await store.server.stop(0)
    assert (await pull).failures == ("timeout",)
    ((_, settled),) = store.held
    assert not settled.done()
    store.network.hangs = False
    await store.transfer.disconnect("worker")  # as the death of the process does
    store.transfer = CopyTransfer(store.network, "store-2", NUM_BLOCKS)
    await store.serve()
    await asyncio.wait_for(settled, PATIENCE_S)
    assert store.worker.peers == {"store-2"}


async def test_a_deadline_ends_the_write_and_forgets_its_reader(store: FetchingStore) -> None:
    lease_id = await lease(store)
    store.network.hangs = True
    answer = await store.servicer.Fetch(request(lease_id, deadline_s=0.1), None)
    assert answer.outcome == BROKEN
    assert store.transfer.peers == set() and not store.index.leases.uses
    store.network.hangs = False
    assert (await store.servicer.Fetch(request(lease_id), None)).outcome == WRITTEN
    await release(store, lease_id)


async def test_a_cancelled_call_leaves_its_slots_held_until_its_write_is_over(
    store: FetchingStore,
) -> None:
    lease_id = await lease(store)
    store.network.hangs = True
    call = asyncio.ensure_future(store.servicer.Fetch(request(lease_id), None))
    await store.until(lambda: store.network.late)
    call.cancel()
    await asyncio.wait([call])
    await release(store, lease_id)
    store.index.drop_corrupt(keys_of(4))
    assert store.index.counts().num_dropped == 1
    store.index.check()
    await store.transfer.disconnect("worker")
    await store.until(lambda: not store.index.leases.uses)
    assert store.index.counts().num_dropped == 0


async def test_connecting_anew_ends_the_writes_of_before(store: FetchingStore) -> None:
    lease_id = await lease(store)
    store.network.hangs = True
    call = asyncio.ensure_future(store.servicer.Fetch(request(lease_id), None))
    await store.until(lambda: store.network.late)
    again = pb.ConnectRequest(agent=agent_to_wire(store.worker.agent))
    await store.servicer.Connect(again, None)
    assert store.network.late[0].done()
    assert (await call).outcome == BROKEN
    await release(store, lease_id)


async def test_a_silent_reader_is_forgotten(store: FetchingStore) -> None:
    assert (await store.pull()).num_blocks == 4
    store.now += 10_000.0
    await store.servicer.expire()
    assert store.transfer.peers == set()


async def test_only_a_lease_of_ones_own_is_written(store: FetchingStore) -> None:
    other = CopyTransfer(store.network, "other", NUM_BLOCKS)
    await store.servicer.Connect(pb.ConnectRequest(agent=agent_to_wire(other.agent)), None)
    lease_id = await lease(store)
    stolen = request(lease_id, incarnation="other")
    assert (await store.servicer.Fetch(stolen, None)).outcome == EXPIRED
    elsewhere = request(lease_id, life="another")
    assert (await store.servicer.Fetch(elsewhere, None)).outcome == EXPIRED
    await release(store, lease_id)
    assert (await store.servicer.Fetch(request(lease_id), None)).outcome == EXPIRED
    assert store.transfer.peers == set() and not other.arena.any()


async def test_nobody_connects_with_the_agent_of_another(store: FetchingStore) -> None:
    forged = dataclasses.replace(store.worker.agent, incarnation="thief")
    stub = store.client._members.shards[store.address]._stub
    with pytest.raises(grpc.RpcError) as raised:
        await stub.Connect(pb.ConnectRequest(agent=agent_to_wire(forged)))
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"local_offsets": []}, "local_offsets", "0 values; the lease has 4"),
        ({"local_offsets": [0] * 5}, "local_offsets", "5 values; the lease has 4"),
        ({"local_offsets": [0] * 4097}, "local_offsets", "4097 values; the limit is 4096"),
        ({"local_offsets": [0, 64 * BLOCK - 1]}, "local_offsets[1]", "arena of 8192 bytes"),
        ({"local_offsets": [2**64 - 1]}, "local_offsets[0]", str(2**64 - 1)),
        ({"life": ""}, "life", "empty"),
        ({"deadline_s": 0.0}, "deadline_s", "above 0"),
        ({"deadline_s": float("nan")}, "deadline_s", "nan"),
        ({"deadline_s": 301.0}, "deadline_s", "at most 300"),
    ],
)
async def test_bad_fields_are_named(
    store: FetchingStore, fields: dict[str, Any], field: str, text: str
) -> None:
    lease_id = await lease(store)
    with pytest.raises(InvalidArgument) as raised:
        await store.servicer.Fetch(request(lease_id, **fields), None)
    (violation,) = raised.value.violations
    assert violation.field == field and text in violation.description
    await release(store, lease_id)
