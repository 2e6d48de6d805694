"""The worker's store client under cancellation, late transfers, bad bytes and dead stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from mesh import kvstore_shard
from mesh.health import HealthServicer
from mesh.kvstore_client import KvStoreClient
from tests.mesh.fake_kvstore import (
    NUM_BLOCKS,
    PATIENCE_S,
    Mesh,
    Store,
    keys_of,
    publish,
)
from tests.mesh.fake_transfer import BLOCK, CopyTransfer


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    made = Mesh()
    yield made
    await made.close()


async def test_an_expired_lease_yields_nothing(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(4)
    await publish(client, keys_of(4))
    mesh.stores[0].expires = True
    result = await mesh.pull(client, keys_of(4))
    assert (result.num_blocks, result.failures) == (0, ("lease",))
    assert mesh.count("kvmesh.kv.verify.failures") == {"lease": 4}


async def test_a_corrupt_block_and_all_after_it_are_dropped_and_reported(mesh: Mesh) -> None:
    client = await mesh.started(2)
    mesh.fill(9)
    keys = keys_of(9)
    await publish(client, keys)
    for store in mesh.stores:
        if keys[5] in store.sealed:
            store.transfer.arena[store.sealed[keys[5]][0] * BLOCK] ^= 1
    assert (await mesh.pull(client, keys)).num_blocks == 5
    await mesh.close()
    assert [key for store in mesh.stores for key in store.corrupt] == [keys[5]]
    assert mesh.count("kvmesh.kv.verify.failures") == {"digest": 1}


async def test_slots_whose_grant_was_lost_are_given_back(mesh: Mesh) -> None:
    client = await mesh.started()
    store = mesh.stores[0]
    mesh.fill(4)
    store.loses_answers = True
    assert await publish(client, keys_of(4)) == 0
    store.loses_answers = False
    await asyncio.wait_for(store.acknowledged.wait(), PATIENCE_S)
    assert not store.reserved
    assert await client.until_up(PATIENCE_S)
    assert await publish(client, keys_of(4)) == 4


async def test_a_frozen_store_is_noticed_before_a_request_asks_it(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    noticed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def explain(shard: kvstore_shard.Shard, reason: str) -> None:
        if not noticed.done():
            noticed.set_result(f"{shard.state.value}, {reason}")

    monkeypatch.setattr(kvstore_shard, "_HEARTBEAT_S", 0.01)
    monkeypatch.setattr(kvstore_shard, "RPC_TIMEOUT_S", 0.3)
    monkeypatch.setattr(kvstore_shard.Shard, "_explain", explain)
    monkeypatch.setattr(HealthServicer, "Check", never)
    await mesh.started()
    assert (await asyncio.wait_for(noticed, PATIENCE_S)).startswith("down, heartbeat")
    assert mesh.stores[0].num_keys_asked == []


@pytest.mark.parametrize("num_turns", range(4))
async def test_a_client_that_closes_just_when_a_store_is_lost_ends(
    mesh: Mesh, num_turns: int
) -> None:
    client = await mesh.started()
    (shard,) = client._members.shards.values()
    shard._lose("lost", is_path_broken=False)
    for _ in range(num_turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_S):
        await client.close()


async def test_blocks_under_a_late_read_are_held_until_it_settles(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(3)
    await publish(client, keys_of(3))
    mesh.network.hangs = True
    result = await client.pull(keys_of(3), [40, 41, 42], deadline_s=0.3, hold=mesh.hold)
    assert (result.num_blocks, result.failures) == (0, ("timeout",))
    assert mesh.held == [([40, 41, 42], mesh.network.late[0])]
    assert not mesh.network.late[0].done()


async def test_a_pull_cancelled_while_reading_holds_blocks_and_ends_its_lease(mesh: Mesh) -> None:
    client = await mesh.started(2)
    mesh.fill(32)
    await publish(client, keys_of(32))
    mesh.network.hangs = True
    mesh.network.started.clear()
    pull = asyncio.ensure_future(mesh.pull(client, keys_of(32)))
    await asyncio.wait_for(mesh.network.started.wait(), PATIENCE_S)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert {block for blocks, _ in mesh.held for block in blocks} <= set(range(32, 64))
    assert len(mesh.held) == len(mesh.network.late)
    await mesh.close()
    assert all(store.num_leases == 1 for store in mesh.stores)


Start = Callable[[Mesh, KvStoreClient], Awaitable[Any]]


@pytest.mark.parametrize(
    "start",
    [
        lambda mesh, client: mesh.pull(client, keys_of(4)),
        lambda mesh, client: publish(client, keys_of(8)),
    ],
    ids=["Lookup", "Reserve"],
)
async def test_what_a_cancelled_call_was_granted_is_given_back(mesh: Mesh, start: Start) -> None:
    client = await mesh.started()
    mesh.fill(8)
    await publish(client, keys_of(4))
    store = mesh.stores[0]
    store.gate = asyncio.Event()
    store.asked.clear()
    call = asyncio.ensure_future(start(mesh, client))
    await asyncio.wait_for(store.asked.wait(), PATIENCE_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    store.gate.set()
    await mesh.close()  # checks that no lease and no reservation is left


@pytest.mark.parametrize("seed", range(4))
async def test_cancelling_at_any_moment_leaves_nothing_behind(mesh: Mesh, seed: int) -> None:
    client = await mesh.started(2)
    generator = np.random.default_rng(seed)
    mesh.fill(24)
    for _ in range(40):
        num = int(generator.integers(1, 25))
        if generator.random() < 0.5:
            call = asyncio.ensure_future(mesh.pull(client, keys_of(num)))
        else:
            private = bool(generator.random() < 0.3)
            call = asyncio.ensure_future(publish(client, keys_of(num), is_private=private))
        for _ in range(int(generator.integers(0, 120))):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
    assert mesh.held == []
    await mesh.close()


async def test_reservations_of_a_failed_write_are_given_back(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(4)
    mesh.network.fails = True
    assert await publish(client, keys_of(4)) == 0
    await mesh.close()
    assert mesh.stores[0].sealed == {}


async def test_reservations_of_a_late_write_are_kept_until_it_settles(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(4)
    mesh.network.hangs = True
    assert await client.put(keys_of(4), list(range(4)), deadline_s=0.3) == 0
    assert len(mesh.stores[0].reserved) == 4
    await mesh.close()
    assert mesh.stores[0].reserved == {}


async def test_reservations_that_expired_are_not_counted(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(4)
    mesh.stores[0].expires = True
    assert await publish(client, keys_of(4)) == 0


async def test_a_private_block_is_read_once(mesh: Mesh) -> None:
    client = await mesh.started()
    data = mesh.fill(1)
    assert await publish(client, keys_of(1), is_private=True) == 1
    for num_blocks in (1, 0):
        pulled = await client.pull(keys_of(1), [9], deadline_s=PATIENCE_S, hold=mesh.hold)
        assert pulled.num_blocks == num_blocks
        assert mesh.block(9).tobytes() == data


async def test_discard_drops_private_blocks(mesh: Mesh) -> None:
    client = await mesh.started(2)
    mesh.fill(6)
    await publish(client, keys_of(6), is_private=True)
    await client.discard(keys_of(6))
    assert all(store.sealed == {} for store in mesh.stores)


async def test_a_dead_store_costs_one_failure_and_is_found_again(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(4)
    await publish(client, keys_of(4))
    (address,) = client.states
    await mesh.stop(address)
    assert (await mesh.pull(client, keys_of(4))).failures == ("lookup",)
    assert client.states == {address: "down"}
    assert (await mesh.pull(client, keys_of(4))).failures == ()
    assert await publish(client, keys_of(4)) == 0
    again = Store(CopyTransfer(mesh.network, "reborn", NUM_BLOCKS))
    await mesh.serve(again, int(address.rpartition(":")[2]))
    assert await client.until_up(PATIENCE_S)
    assert mesh.worker.peers == {"reborn"}
    assert await publish(client, keys_of(4)) == 4
    assert (await mesh.pull(client, keys_of(4))).num_blocks == 4


async def test_a_store_that_forgot_us_is_connected_again(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.stores[0].connected.clear()
    mesh.fill(2)
    assert await publish(client, keys_of(2)) == 0
    assert await client.until_up(PATIENCE_S)
    assert await publish(client, keys_of(2)) == 2


async def test_a_broken_path_is_made_anew(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(2)
    await publish(client, keys_of(2))
    mesh.network.fails = True
    assert (await mesh.pull(client, keys_of(2))).failures == ("read",)
    assert set(client.states.values()) == {"down"}
    mesh.network.fails = False
    assert await client.until_up(PATIENCE_S)
    assert (await mesh.pull(client, keys_of(2))).num_blocks == 2


async def test_the_other_shards_serve_while_one_is_down(mesh: Mesh) -> None:
    client = await mesh.started(3)
    await mesh.stop(next(iter(client.states)))
    mesh.fill(16)
    await publish(client, keys_of(16))
    assert await publish(client, keys_of(16)) == 16
    assert (await mesh.pull(client, keys_of(16))).num_blocks == 16


async def test_a_store_of_another_version_stays_down(mesh: Mesh) -> None:
    address = await mesh.serve(Store(CopyTransfer(mesh.network, "old", NUM_BLOCKS, version="0")))
    client = await mesh.client(address)
    assert client.states == {address: "down"}
    assert (await mesh.pull(client, keys_of(2))).num_blocks == 0


async def test_slots_outside_the_arena_are_never_read(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(4)
    await publish(client, keys_of(4))
    store = mesh.stores[0]
    store.sealed[keys_of(4)[2]] = (NUM_BLOCKS, 0)
    result = await mesh.pull(client, keys_of(4))
    assert (result.num_blocks, result.failures) == (2, ("slot",))
