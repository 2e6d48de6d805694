"""The kvstores a gateway polls and discards at come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.services.gateway.fake_mesh import FakeStore


async def test_stores_that_join_are_used_and_those_that_left_are_not(make_rig: Any) -> None:
    rig = await make_rig()
    router, (first,) = rig.gateway.router, rig.stores
    await rig.until(lambda: router.kvstores[0].is_ready)
    before = set(asyncio.all_tasks())
    instance, second = router.kvstores[0], FakeStore()
    await second.start()
    router.follow_kvstores([second.address, first.address])
    assert router.kvstores[1] is instance
    await rig.until(lambda: [i.is_ready for i in router.kvstores] == [True, True])
    router.follow_kvstores([second.address])
    assert [i.address for i in router.instances[-1:]] == [second.address]
    rig.gateway._stores.discard(b"k" * 32)
    await asyncio.wait_for(second.has_discarded.wait(), 20)
    assert (first.discarded, second.discarded) == ([], [b"k" * 32])
    router.follow_kvstores([])
    while router._leaving:
        await asyncio.wait(router._leaving)
    assert rig.gateway.is_ready and len(router._watches) == 2
    await second.kill()
    assert {t for t in asyncio.all_tasks() - before if "_watch" in repr(t)} == set()


async def test_a_discard_under_way_ends_although_its_store_left(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, gate, inner = asyncio.Event(), asyncio.Event(), FakeStore.Discard

    async def wait(self: FakeStore, request: Any, context: Any) -> Any:
        asked.set()
        await gate.wait()
        return await inner(self, request, context)

    monkeypatch.setattr(FakeStore, "Discard", wait)
    rig = await make_rig()
    (store,) = rig.stores
    rig.gateway._stores.discard(b"k" * 32)
    await asyncio.wait_for(asked.wait(), 20)
    rig.gateway.router.follow_kvstores([])
    gate.set()
    await asyncio.wait_for(store.has_discarded.wait(), 20)
