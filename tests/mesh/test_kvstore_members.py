"""Stores that join and leave while a client uses them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh import kvstore_members
from mesh.kvstore_client import Deadline, KvStoreClient
from tests.mesh.fake_kvstore import NUM_BLOCKS, PATIENCE_S, Mesh, Store, keys_of, publish, until
from tests.mesh.fake_transfer import CopyTransfer


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    made = Mesh()
    yield made
    await made.close()


async def _serve(mesh: Mesh, name: str) -> str:
    return await mesh.serve(Store(CopyTransfer(mesh.network, name, NUM_BLOCKS)))


def _owners(client: KvStoreClient, keys: list[bytes]) -> dict[bytes, str]:
    shards = client._shards.assign(keys)
    return {keys[index]: shard.address for shard, indices in shards for index in indices}


async def test_a_store_that_joins_takes_keys_from_others_and_gives_them_back(mesh: Mesh) -> None:
    client = await mesh.started(2)
    keys, addresses = keys_of(600), list(client.states)
    before = _owners(client, keys)
    third = await _serve(mesh, "third")
    client.follow([*addresses, third])
    assert _owners(client, keys) == before, "asked before it is up"
    assert await client.until_up(PATIENCE_S)
    joined = _owners(client, keys)
    moved = [key for key in keys if joined[key] != before[key]]
    assert {joined[key] for key in moved} == {third}
    assert 140 < len(moved) < 260
    client.follow(addresses)
    assert _owners(client, keys) == before
    client.follow([third, addresses[1]])
    await until(lambda: client.states == {third: "up", addresses[1]: "up"})
    left = _owners(client, keys)
    assert all(left[key] == joined[key] for key in keys if joined[key] != addresses[0])


async def test_a_store_that_left_is_not_asked_and_nothing_of_it_stays(mesh: Mesh) -> None:
    client = await mesh.started(2)
    mesh.fill(16)
    await publish(client, keys_of(16))
    num_tasks = len(asyncio.all_tasks())
    address, stay = client.states
    store = mesh.stores[0]
    for _ in range(3):
        client.follow([stay])
        await until(lambda: client.states == {stay: "up"})
        assert mesh.worker.peers == {"store-1"}
        store.num_keys_asked.clear()
        await publish(client, keys_of(16))
        assert (await mesh.pull(client, keys_of(16))).num_blocks == 16
        assert store.num_keys_asked == []
        client.follow([address, stay])
        assert await client.until_up(PATIENCE_S)
    assert mesh.worker.peers == {"store-0", "store-1"}
    await until(lambda: len(asyncio.all_tasks()) <= num_tasks)


async def test_a_pull_under_way_ends_well_after_its_store_left(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(4)
    await publish(client, keys_of(4))
    store = mesh.stores[0]
    store.gate = asyncio.Event()
    store.asked.clear()
    pull = asyncio.ensure_future(mesh.pull(client, keys_of(4)))
    await asyncio.wait_for(store.asked.wait(), PATIENCE_S)
    client.follow([])
    await asyncio.sleep(0)
    assert set(client.states.values()) == {"leaving"}
    store.gate.set()
    assert (await pull).num_blocks == 4
    await until(lambda: client.states == {})
    assert mesh.worker.peers == set() and store.leases == {}


async def test_slots_at_a_store_that_left_are_given_back_and_asked_for_at_the_others(
    mesh: Mesh,
) -> None:
    client = await mesh.started(2)
    mesh.fill(16)
    sending = client.publish(keys_of(16))
    await sending.reserve(Deadline(PATIENCE_S))
    assert all(store.reserved for store in mesh.stores)
    gone, stay = client.states
    client.follow([stay])
    await asyncio.sleep(0)
    assert client.states[gone] == "leaving"
    assert await sending.send(0, list(range(16)), Deadline(PATIENCE_S)) == 16
    await until(lambda: client.states == {stay: "up"})
    assert len(mesh.stores[1].sealed) == 16
    assert mesh.stores[0].sealed == {} and mesh.stores[0].reserved == {}
    sending.close()


@pytest.mark.parametrize("kind", ["reserve", "pull"])
async def test_a_store_that_leaves_at_any_moment_keeps_no_promise(mesh: Mesh, kind: str) -> None:
    client = await mesh.started(2)
    mesh.fill(16)
    await publish(client, keys_of(8))
    gone, stay = client.states
    for num_turns in range(40):
        client.follow([gone, stay])
        assert await client.until_up(PATIENCE_S)
        sending = client.publish(keys_of(16)[8:])
        work = mesh.pull(client, keys_of(8)) if kind == "pull" else sending.reserve(Deadline(9.0))
        task = asyncio.ensure_future(work)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        client.follow([stay])
        await task
        sending.close()
        await until(lambda: client.states == {stay: "up"})
        assert mesh.stores[0].reserved == {} and mesh.stores[0].leases == {}, num_turns


async def test_a_late_write_is_acknowledged_before_its_store_is_gone(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(4)
    mesh.network.hangs = True
    assert await client.put(keys_of(4), list(range(4)), deadline_s=0.3) == 0
    client.follow([])
    await asyncio.sleep(0)
    assert set(client.states.values()) == {"leaving"} and len(mesh.stores[0].reserved) == 4
    for settled in mesh.network.late:
        settled.set_result(None)
    await until(lambda: client.states == {})
    assert mesh.stores[0].reserved == {}


async def test_what_never_ends_is_cut_off(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore_members, "_LEAVE_S", 0.05)
    monkeypatch.setattr(kvstore_members, "RPC_TIMEOUT_S", 0.05)
    client = await mesh.started()
    mesh.fill(4)
    mesh.network.hangs = True
    assert await client.put(keys_of(4), list(range(4)), deadline_s=0.3) == 0
    client.follow([])
    await until(lambda: client.states == {})
    assert mesh.worker.peers == set()
    mesh.stores[0].reserved.clear()  # the store's own deadline


async def test_a_store_that_comes_back_before_it_was_gone_keeps_its_connection(mesh: Mesh) -> None:
    client = await mesh.started()
    (address,) = client.states
    sending = client.publish(keys_of(4))
    await sending.reserve(Deadline(PATIENCE_S))
    shard = client._members.shards[address]
    client.follow([])
    await asyncio.sleep(0)
    client.follow([address])
    sending.close()
    assert client._members.shards[address] is shard and client.states == {address: "up"}
    mesh.fill(4)
    assert await publish(client, keys_of(4)) == 4


async def test_another_name_of_a_store_keeps_the_peer(mesh: Mesh) -> None:
    client = await mesh.started()
    (address,) = client.states
    alias = address.replace("127.0.0.1", "localhost")
    client.follow([address, alias])
    assert await client.until_up(PATIENCE_S)
    client.follow([alias])
    await until(lambda: client.states == {alias: "up"})
    mesh.fill(2)
    assert await publish(client, keys_of(2)) == 2


async def test_a_client_closes_while_stores_come_and_go(mesh: Mesh) -> None:
    client = await mesh.started(2)
    num_tasks = len(asyncio.all_tasks())
    sending = client.publish(keys_of(8))
    await sending.reserve(Deadline(PATIENCE_S))
    addresses = list(client.states)
    client.follow(addresses[1:])
    client.follow(["127.0.0.1:1", addresses[0]])
    client.follow([])
    sending.close()
    await client.close()
    assert mesh.worker.peers == set()
    assert len(asyncio.all_tasks()) < num_tasks
