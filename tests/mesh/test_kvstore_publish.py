"""Slots of a publish: asked for early, filled in parts, only while and where they are granted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from mesh.kvstore_client import Deadline
from tests.mesh.fake_kvstore import NUM_BLOCKS, PATIENCE_S, Mesh, Store, keys_of
from tests.mesh.fake_transfer import BLOCK, CopyTransfer


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    made = Mesh()
    yield made
    await made.close()


async def test_slots_asked_for_early_are_filled_part_by_part_and_the_rest_given_back(
    mesh: Mesh,
) -> None:
    client = await mesh.started(2)
    mesh.fill(6)
    keys, deadline = keys_of(8), Deadline(PATIENCE_S)
    publish = client.publish(keys)
    await publish.reserve(deadline)
    assert sum(len(store.reserved) for store in mesh.stores) == 8
    assert await publish.send(0, [0, 1, 2], deadline) == 3
    assert await publish.send(3, [3, 4, 5], deadline) == 3
    publish.close()
    assert (await mesh.pull(client, keys)).num_blocks == 6
    await mesh.close()
    assert all(not store.reserved for store in mesh.stores)


async def test_a_slot_that_another_writer_gave_up_is_asked_for_again(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(2)
    deadline = Deadline(PATIENCE_S)
    first, second = client.publish(keys_of(2)), client.publish(keys_of(2))
    await first.reserve(deadline)
    await second.reserve(deadline)
    first.close()
    mesh.stores[0].reserved.clear()
    assert await second.send(0, [0, 1], deadline) == 2
    second.close()


async def test_slots_that_come_after_the_end_are_given_back(mesh: Mesh) -> None:
    client = await mesh.started()
    publish = client.publish(keys_of(3))
    reserving = asyncio.ensure_future(publish.reserve(Deadline(PATIENCE_S)))
    await asyncio.sleep(0)
    publish.close()
    await reserving
    await mesh.close()
    assert not mesh.stores[0].reserved


async def test_nothing_is_written_into_slots_that_may_have_expired(mesh: Mesh) -> None:
    client = await mesh.started()
    data, (store,) = mesh.fill(2), mesh.stores
    publish = client.publish(keys_of(2))
    await publish.reserve(Deadline(PATIENCE_S))
    old = [slot for _, slot, _ in store.reserved.values()]
    store.reserved.clear()  # their time is over, and they are another's
    assert await publish.send(0, [0, 1], Deadline(200.0)) == 2  # a WRITE may take longer than that
    publish.close()
    blocks = store.transfer.arena.reshape(NUM_BLOCKS, BLOCK)
    assert not blocks[old].any()
    assert b"".join(blocks[store.sealed[key][0]].tobytes() for key in keys_of(2)) == data


async def test_a_slot_is_of_the_life_of_the_store_that_granted_it(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(2)
    publish = client.publish(keys_of(2))
    await publish.reserve(Deadline(PATIENCE_S))
    (address,) = client.states
    await mesh.stop(address)
    mesh.stores[0].reserved.clear()  # gone with it
    assert (await mesh.pull(client, keys_of(1))).failures == ("lookup",)
    again = Store(CopyTransfer(mesh.network, "reborn", NUM_BLOCKS))
    again.hide_slots(2)  # where the old life's were
    await mesh.serve(again, int(address.rpartition(":")[2]))
    assert await client.until_up(PATIENCE_S)
    assert await publish.send(0, [0, 1], Deadline(PATIENCE_S)) == 2
    publish.close()
    written = mesh.network.arenas["reborn"].reshape(NUM_BLOCKS, BLOCK).any(axis=1)
    assert {int(i) for i in np.flatnonzero(written)} == {again.sealed[key][0] for key in keys_of(2)}


async def test_what_is_written_early_is_sealed_only_when_it_may_be(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(4)
    keys, deadline = keys_of(4), Deadline(PATIENCE_S)
    publish, (store,) = client.publish(keys), mesh.stores
    await publish.reserve(deadline)
    may_seal: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    blocks = store.transfer.arena.reshape(NUM_BLOCKS, BLOCK)
    sends = [
        asyncio.ensure_future(publish.send(first, [first, first + 1], deadline, may_seal))
        for first in (0, 2)
    ]
    async with asyncio.timeout(PATIENCE_S):
        while np.count_nonzero(blocks.any(axis=1)) < 4:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not store.sealed
    sends[1].cancel()  # takes nothing from the other, which waits for the same
    await asyncio.wait([sends[1]])
    may_seal.set_result(True)
    assert await sends[0] == 2
    assert set(store.sealed) == set(keys[:2])
    publish.close()
    await mesh.close()
    assert not store.reserved


async def test_what_may_not_be_sealed_is_given_back(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(3)
    keys, loop = keys_of(3), asyncio.get_running_loop()
    publish, (store,) = client.publish(keys), mesh.stores
    await publish.reserve(Deadline(PATIENCE_S))
    refused, late = loop.create_future(), loop.create_future()
    refused.set_result(False)
    assert await publish.send(0, [0], Deadline(PATIENCE_S), refused) == 0
    assert await publish.send(1, [1], Deadline(0.2), late) == 0
    assert not late.done()
    publish.close()
    await mesh.close()
    assert not store.sealed and not store.reserved
