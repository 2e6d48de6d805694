"""What a worker gives back reaches the store that granted it, and no other life of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh import kvstore_client, kvstore_giveback
from mesh.kvstore_client import Deadline, KvStoreClient
from mesh.kvstore_publish import Publish
from mesh.kvstore_shard import Shard
from tests.mesh.fake_kvstore import (
    NUM_BLOCKS,
    PATIENCE_S,
    Mesh,
    Store,
    keys_of,
    publish,
    until,
)
from tests.mesh.fake_transfer import CopyTransfer


@pytest.fixture
async def mesh(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setattr(kvstore_giveback, "FIRST_BACK_OFF_S", 0.01)
    monkeypatch.setattr(kvstore_giveback, "LAST_BACK_OFF_S", 0.02)
    made = Mesh()
    yield made
    await made.close()


def _shard(client: KvStoreClient) -> Shard:
    (shard,) = client._members.shards.values()
    return shard


async def _reserved(client: KvStoreClient, num: int) -> Publish:
    sending = client.publish(keys_of(num))
    await sending.reserve(Deadline(PATIENCE_S))
    return sending


async def _until_idle(client: KvStoreClient) -> None:
    await until(lambda: not client._shards.give_back._queues)
    assert not len(_shard(client).uses)


async def test_a_lease_whose_answer_was_lost_is_given_back(mesh: Mesh) -> None:
    client = await mesh.started()
    (store,) = mesh.stores
    mesh.fill(4)
    await publish(client, keys_of(4))
    store.loses_answers = True
    assert (await mesh.pull(client, keys_of(4))).failures == ("lookup",)
    store.loses_answers = False
    await _until_idle(client)
    assert store.num_leases == 1 and not store.leases
    assert await client.until_up(PATIENCE_S)
    assert (await mesh.pull(client, keys_of(4))).num_blocks == 4


async def test_a_lease_that_could_not_be_released_is_given_back_and_what_it_read_not_used(
    mesh: Mesh,
) -> None:
    client = await mesh.started()
    (store,) = mesh.stores
    mesh.fill(4)
    await publish(client, keys_of(4))
    store.is_deaf = True
    result = await mesh.pull(client, keys_of(4))
    assert (result.num_blocks, result.failures) == (0, ("lease",))
    await until(lambda: len(store.told) >= 3)
    assert store.leases
    store.is_deaf = False
    await _until_idle(client)
    assert not store.leases


async def test_a_store_that_does_not_answer_is_told_again_by_one_task(mesh: Mesh) -> None:
    client = await mesh.started()
    (store,) = mesh.stores
    sending = [await _reserved(client, num) for num in range(1, 17)]
    num_tasks = len(asyncio.all_tasks())
    store.is_deaf = True
    for each in sending:
        each.close()
    await until(lambda: len(store.told) >= 3)
    assert len(asyncio.all_tasks()) <= num_tasks + 4, "the queue, its call at both ends, the loss"
    assert len(store.reserved) == 16
    store.is_deaf = False
    await _until_idle(client)
    assert not store.reserved and store.told[-1] == (16, 0)


async def test_a_life_that_granted_nothing_keeps_what_it_grants_under_the_same_ids(
    mesh: Mesh,
) -> None:
    client = await mesh.started()
    old = await _reserved(client, 2)
    (first,) = mesh.stores
    (address,) = client.states
    first.is_deaf = True
    old.close()
    await until(lambda: bool(first.told))
    await mesh.stop(address)
    again = Store(CopyTransfer(mesh.network, "reborn", NUM_BLOCKS))
    again.is_deaf = True
    await mesh.serve(again, int(address.rpartition(":")[2]))
    await until(lambda: _shard(client).life == "reborn")
    assert await client.until_up(PATIENCE_S)
    mesh.fill(2)
    sending = await _reserved(client, 2)
    assert again.reserved.keys() == first.reserved.keys()
    again.is_deaf = False
    await until(lambda: not client._shards.give_back._queues)
    assert again.refusals == ["Acknowledge"] and len(again.reserved) == 2
    assert await client.until_up(PATIENCE_S)
    assert await sending.send(0, [0, 1], Deadline(PATIENCE_S)) == 2
    first.reserved.clear()  # gone with it


async def test_a_seal_of_another_life_seals_nothing(mesh: Mesh) -> None:
    async def digest_while_the_store_restarts(block_ids: list[int]) -> list[int]:
        await mesh.network.started.wait()  # and ended: it copies at once
        mesh.stores[0].transfer.agent = CopyTransfer(mesh.network, "reborn", NUM_BLOCKS).agent
        _shard(client)._lose("restarts", is_path_broken=False)
        await until(lambda: _shard(client).life == "reborn")
        assert await client.until_up(PATIENCE_S)
        return [7] * len(block_ids)

    mesh.digest = digest_while_the_store_restarts  # pyright: ignore[reportAttributeAccessIssue]
    client = await mesh.started()
    (store,) = mesh.stores
    sending = await _reserved(client, 2)
    assert await sending.send(0, [0, 1], Deadline(PATIENCE_S)) == 0
    assert store.refusals[:1] == ["Seal"] and not store.sealed
    store.reserved.clear()  # another's, under the same ids


async def test_a_store_that_left_and_cannot_be_told_is_let_go(mesh: Mesh) -> None:
    client = await mesh.started()
    (store,) = mesh.stores
    sending = await _reserved(client, 4)
    store.is_deaf = True
    sending.close()
    await until(lambda: len(store.told) >= 2)
    assert len(_shard(client).uses)
    client.follow([])
    await until(lambda: client.states == {})
    assert not client._shards.give_back._queues
    store.reserved.clear()  # the store's own deadline


async def test_closing_lets_out_what_could_not_be_told_before(mesh: Mesh) -> None:
    client = await mesh.started()
    (store,) = mesh.stores
    sending = await _reserved(client, 4)
    store.is_deaf = True
    sending.close()
    await until(lambda: len(store.told) >= 2)
    store.is_deaf = False
    await client.close()
    assert not store.reserved


async def test_closing_ends_what_cannot_be_told(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore_client, "_CLOSE_TIMEOUT_S", 0.05)
    client = await mesh.started()
    (store,) = mesh.stores
    store.is_deaf = True
    first, second = await _reserved(client, 2), await _reserved(client, 4)
    first.close()
    await client.close()
    second.close()  # of a request that ends after its worker
    await until(lambda: not client._shards.give_back._queues)
    store.reserved.clear()  # the store's own deadline


async def test_slots_of_a_late_write_are_told_when_it_is_over_until_the_store_hears(
    mesh: Mesh,
) -> None:
    client = await mesh.started()
    (store,) = mesh.stores
    mesh.fill(4)
    mesh.network.hangs = True
    sending = await _reserved(client, 4)
    assert await sending.send(0, list(range(4)), Deadline(0.3)) == 0
    mesh.network.hangs = False
    assert (await mesh.pull(client, keys_of(4))).failures == ()  # a call that comes after any
    assert not store.told and len(_shard(client).uses) >= 4
    store.is_deaf = True
    for settled in mesh.network.late:
        settled.set_result(None)
    await until(lambda: len(store.told) >= 2)
    store.is_deaf = False
    await _until_idle(client)
    assert not store.reserved and set(store.told) == {(4, 0)}


async def test_what_has_ended_by_itself_is_not_told_any_more(mesh: Mesh) -> None:
    client = await mesh.started()
    (store,) = mesh.stores
    store.is_deaf = True
    shard, give_back = _shard(client), client._shards.give_back
    give_back.attempt(shard, 7, 0.05)
    task = give_back.slots(shard, shard.life, [1, 2, 3], 0.05)
    await asyncio.wait_for(task, PATIENCE_S)
    assert set(store.told) == {(3, 1)}
    await _until_idle(client)


async def test_no_call_names_more_than_the_store_takes(mesh: Mesh) -> None:
    client = await mesh.started()
    (store,) = mesh.stores
    shard, give_back = _shard(client), client._shards.give_back
    for attempt in range(1, 5001):
        give_back.attempt(shard, attempt, PATIENCE_S)
    give_back.slots(shard, "before", range(1, 11), PATIENCE_S)
    await give_back.slots(shard, shard.life, range(1, 9001), PATIENCE_S)
    assert store.told == [(10, 4096), (4096, 904), (4096, 0), (808, 0)]
    assert store.refusals == ["Acknowledge"]
