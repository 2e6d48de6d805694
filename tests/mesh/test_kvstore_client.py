"""The worker's store client when all goes well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from kv.nixl_transfer import NixlTransfer
from tests.mesh.fake_kvstore import (
    NUM_BLOCKS,
    PATIENCE_S,
    Mesh,
    Store,
    digest_of,
    keys_of,
    publish,
)
from tests.mesh.fake_transfer import BLOCK


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    made = Mesh()
    yield made
    await made.close()


@pytest.mark.parametrize("num_stores", [1, 3])
async def test_published_blocks_are_pulled_from_every_shard(mesh: Mesh, num_stores: int) -> None:
    client = await mesh.started(num_stores)
    data, keys = mesh.fill(32), keys_of(32)
    assert await publish(client, keys) == 32
    assert all(store.sealed for store in mesh.stores)
    result = await mesh.pull(client, keys)
    assert (result.num_blocks, result.failures) == (32, ())
    assert mesh.worker.arena[32 * BLOCK : 64 * BLOCK].tobytes() == data
    assert mesh.count("kvmesh.kv.transfer.io") == {"put": 32 * BLOCK, "get": 32 * BLOCK}
    assert mesh.count("kvmesh.kv.transfer.duration").keys() == {"put", "get"}


async def test_blocks_are_published_on_behalf_of_a_tenant(mesh: Mesh) -> None:
    client = await mesh.started()
    assert await publish(client, keys_of(2)) == 2
    assert await publish(client, keys_of(4), tenant="t") == 4
    assert mesh.stores[0].tenants == ["", "t"]


async def test_a_prompt_without_full_blocks_asks_nobody(mesh: Mesh) -> None:
    client = await mesh.started()
    assert (await mesh.pull(client, [])).num_blocks == 0
    assert await client.put([], [], deadline_s=1.0) == 0
    assert mesh.stores[0].num_keys_asked == []


async def test_without_stores_nothing_is_found(mesh: Mesh) -> None:
    client = await mesh.client()
    assert client.states == {}
    assert (await mesh.pull(client, keys_of(3))).num_blocks == 0
    assert await publish(client, keys_of(3)) == 0


async def test_only_the_common_prefix_of_all_shards_is_moved(mesh: Mesh) -> None:
    client = await mesh.started(3)
    keys = keys_of(24)
    mesh.fill(24)
    assert (
        await client.put(keys[:10] + keys[11:], [*range(10), *range(11, 24)], deadline_s=PATIENCE_S)
        == 23
    )
    mesh.network.num_moved = 0
    assert (await mesh.pull(client, keys)).num_blocks == 10
    assert mesh.network.num_moved == 10


async def test_sealed_blocks_are_not_written_again(mesh: Mesh) -> None:
    client = await mesh.started()
    mesh.fill(8)
    assert await publish(client, keys_of(5)) == 5
    assert await publish(client, keys_of(8)) == 8
    assert mesh.network.num_moved == 8


async def test_a_full_store_seals_what_it_can(mesh: Mesh) -> None:
    client = await mesh.started(capacity=3)
    mesh.fill(8)
    assert await publish(client, keys_of(8)) == 3


async def test_long_prompts_are_looked_up_in_chunks(mesh: Mesh) -> None:
    client = await mesh.started()
    store, keys = mesh.stores[0], keys_of(9000)
    store.sealed = {key: (0, digest_of(np.zeros(BLOCK, np.uint8))) for key in keys[:8200]}
    result = await client.pull(keys, [1] * 9000, deadline_s=PATIENCE_S, hold=mesh.hold)
    assert result.num_blocks == 8200
    assert store.num_keys_asked == [4096, 4096, 808]
    assert store.num_leases == 3


async def test_blocks_travel_over_nixl(mesh: Mesh) -> None:
    loop = asyncio.get_running_loop()
    arenas = [np.zeros(NUM_BLOCKS * BLOCK, np.uint8) for _ in range(2)]
    ours, theirs = (
        NixlTransfer.create(role=role, incarnation=role, arena=arena, loop=loop)
        for role, arena in zip(("worker", "kvstore"), arenas, strict=True)
    )
    mesh.worker = ours
    rows = arenas[0].reshape(NUM_BLOCKS, BLOCK)

    async def digest(block_ids: list[int]) -> list[int]:
        return [digest_of(rows[block_id]) for block_id in block_ids]

    mesh.digest = digest
    store = Store(theirs)
    client = await mesh.client(await mesh.serve(store))
    assert await client.until_up(PATIENCE_S)
    blocks = np.random.default_rng(0).integers(0, 256, (NUM_BLOCKS, BLOCK), np.uint8)
    arenas[0][:] = blocks.reshape(-1)

    assert await publish(client, keys_of(20)) == 20
    assert (await mesh.pull(client, keys_of(20))).num_blocks == 20
    np.testing.assert_array_equal(arenas[0].reshape(NUM_BLOCKS, BLOCK)[32:52], blocks[:20])
    await mesh.close()
    ours.close()
    theirs.close()
