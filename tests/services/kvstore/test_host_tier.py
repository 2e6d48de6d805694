"""A GPU's arena with DRAM and disk behind it, on plain memory: right bytes, from the right tier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from services.kvstore.arena import SlotAllocator
from services.kvstore.copies import Span, merged
from services.kvstore.index import BlockIndex
from services.kvstore.tiers import Promoted
from tests.services.kvstore.tiered_store import PATIENCE_S, SIZE, TieredStore, keys_of

FAILURES, MOVES = "kvmesh.kv.verify.failures", "kvmesh.kv.tier.blocks"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[TieredStore]:
    made = await TieredStore.start(tmp_path / "disk", num_host=8)
    yield made
    await made.close()


async def test_what_the_arena_has_no_room_for_comes_back_from_dram(store: TieredStore) -> None:
    await store.put_below("abcdefgh")
    store.put("ijkl")
    await store.until(lambda: not store.num_pending)
    counts = store.index.counts()
    assert (counts.num_sealed, counts.num_in_host, counts.num_on_disk) == (4, 8, 12)
    assert counts.host_num_bytes == 8 * SIZE
    assert await store.look_up("abcd") == "abcd", "children go first"
    assert store.counted(MOVES, "dram") == {"demoted": 12, "promoted": 4}
    assert store.files.num_reads == 0


async def test_a_lookup_tells_what_came_back_for_it(store: TieredStore) -> None:
    await store.put_below("abcd")
    for num_promoted in (4, 0):
        leased = await store.mover.lookup(
            "r", keys_of("abcd"), SIZE, ttl_s=60, max_wait_s=PATIENCE_S
        )
        assert leased.num_promoted == num_promoted
        assert store.read("abcd", leased) == "abcd"


async def test_what_dram_has_no_room_for_comes_back_from_disk(store: TieredStore) -> None:
    for names in ("abcd", "efgh", "ijkl", "mnop"):
        await store.put_below(names)
    assert store.index.counts().num_in_host == 8
    assert await store.look_up("abcd") == "abcd"
    assert store.counted(MOVES, "disk") == {"demoted": 16, "promoted": 4}
    assert "promoted" not in store.counted(MOVES, "dram")


async def test_what_came_from_disk_is_in_dram_again(store: TieredStore) -> None:
    for names in ("abcd", "efgh", "ijkl"):
        await store.put_below(names)
    assert await store.look_up("abcd") == "abcd"
    await store.until(lambda: not store.num_pending)
    assert store.index.evict(4) == 4
    assert await store.look_up("abcd") == "abcd"
    assert store.counted(MOVES, "dram")["promoted"] == store.files.num_reads == 4


async def test_a_chain_may_lie_in_all_tiers(tmp_path: Path) -> None:
    store = await TieredStore.start(tmp_path, num_host=2, num_slots=16)
    await store.put_below("abcdef")
    assert await store.look_up("a") == "a"
    await store.until(lambda: not store.num_pending)
    before = store.index.counts().num_in_host, store.files.num_reads
    assert before == (2, 1)
    assert await store.look_up("abcdef") == "abcdef"
    assert store.counted(MOVES, "dram")["promoted"] >= 1
    assert store.files.num_reads >= 4
    await store.close()


async def test_a_corrupt_block_leaves_every_tier(store: TieredStore) -> None:
    store.put("ab")
    await store.until(lambda: not store.num_pending)
    assert store.index.drop_corrupt(keys_of("b")) == 1
    store.mover.wake()
    await store.until(lambda: store.on_disk("ab") == "a")
    assert store.index.counts().num_in_host == 1
    assert await store.look_up("ab") == "a"


async def test_a_report_of_a_block_that_left_the_arena_reaches_its_copies(
    store: TieredStore,
) -> None:
    await store.put_below("ab")
    assert store.index.drop_corrupt(keys_of("b")) == 1
    assert store.index.counts().num_in_host == 1
    assert await store.look_up("ab") == "a"


async def test_a_block_that_is_copied_when_it_is_reported_is_in_no_tier(store: TieredStore) -> None:
    store.engine.gate.clear()
    store.put("a")
    assert store.index.drop_corrupt(keys_of("a")) == 1
    assert store.index.counts().num_dropped == 1, "its slot was freed under the copy"
    store.engine.gate.set()
    await store.until(lambda: not store.num_pending)
    counts = store.index.counts()
    assert (counts.num_dropped, counts.num_in_host, counts.host_num_bytes) == (0, 0, 0)
    assert await store.look_up("a") == ""


async def test_private_blocks_never_reach_dram(store: TieredStore) -> None:
    store.put("p", is_private=True)
    await store.put_below("a")
    assert store.index.counts().num_in_host == 1


async def test_copies_that_fail_leave_the_other_tiers(store: TieredStore) -> None:
    await store.put_below("abcd")
    store.engine.error = RuntimeError("the GPU is gone")
    assert await store.look_up("abcd") == ""
    assert store.counted(FAILURES)["host_read"] == 4
    store.engine.error = None
    assert await store.look_up("abcd") == "abcd"
    assert store.files.num_reads == 4


async def test_dram_that_takes_nothing_is_left_alone_for_a_while(store: TieredStore) -> None:
    store.engine.error = RuntimeError("no")
    store.put("a")
    await store.until(lambda: store.counted(FAILURES) == {"host_write": 1, "disk_copy": 1})
    store.engine.error = None
    store.put("b")
    assert store.num_pending == 2, "it was asked again at once"
    store.now += 6
    store.mover.wake()
    await store.until(lambda: store.on_disk("ab") == "b" and not store.num_pending)
    assert store.index.counts().num_in_host == 1


async def test_a_hanging_disk_keeps_nobody_from_dram(tmp_path: Path) -> None:
    store = await TieredStore.start(tmp_path, num_host=2)
    await store.put_below("ab")
    await store.put_below("cd")
    store.files.gate.clear()
    assert await store.look_up("ab", max_wait_s=0.01) == ""
    await store.until(lambda: store.files.num_reads)
    store.now += 6
    assert await asyncio.wait_for(store.look_up("cd"), PATIENCE_S) == "cd"
    assert await asyncio.wait_for(store.look_up("b", max_wait_s=1000), PATIENCE_S) == ""
    await store.close()


async def test_a_copy_that_is_read_back_keeps_its_place(tmp_path: Path) -> None:
    store = await TieredStore.start(tmp_path, num_host=1)
    await store.put_below("a")
    store.engine.gate.clear()
    lookup = asyncio.ensure_future(store.look_up("a"))
    await store.until(lambda: store.engine.num_writes)
    store.put("b")
    store.engine.gate.set()
    assert await asyncio.wait_for(lookup, PATIENCE_S) == "a"
    await store.until(lambda: not store.num_pending)
    host = store.index.lower.host
    assert host is not None and host.has(store.index._blocks.row_of(keys_of("a")[0]))
    assert store.files.num_reads == 0
    await store.close()


async def test_a_restart_has_the_disk_only(tmp_path: Path) -> None:
    first = await TieredStore.start(tmp_path, num_host=8)
    await first.put_below("abcd")
    await first.close()
    assert not first.engine.pinned, "a buffer stayed pinned"
    second = await TieredStore.start(tmp_path, num_host=8)
    counts = second.index.counts()
    assert (counts.num_in_host, counts.num_on_disk) == (0, 4)
    assert await second.look_up("abcd") == "abcd"
    await second.close()


async def test_a_buffer_that_cannot_be_pinned_will_do(tmp_path: Path) -> None:
    store = await TieredStore.start(tmp_path, num_host=1)
    store.engine.pin_error = RuntimeError("no more pages")
    await store.put_below("ab")
    assert await store.look_up("ab") == "ab"
    assert not store.engine.pinned and store.files.num_reads >= 1
    await store.close()


async def test_neighbours_are_copied_in_one(store: TieredStore) -> None:
    await store.put_below("abcd")
    assert await store.look_up("abcd") == "abcd"
    assert store.engine.num_writes == 1 and store.engine.num_spans == 1


def test_spans_merge_where_both_sides_are_neighbours() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        offsets = rng.permutation(12)[:6].tolist()
        places = rng.permutation(12)[:6].tolist()
        spans = [Span(8 * a, 1000 + 8 * b, 8) for a, b in zip(offsets, places, strict=True)]
        words = {(s.offset + i, s.address + i) for s in spans for i in range(s.num_bytes)}
        runs = merged(spans)
        assert {(r.offset + i, r.address + i) for r in runs for i in range(r.num_bytes)} == words
        ends = {(run.offset + run.num_bytes, run.address + run.num_bytes) for run in runs}
        assert not ends & {(run.offset, run.address) for run in runs}, "neighbours are apart"


def test_a_long_promotion_begins_before_it_is_planned_to_the_end() -> None:
    keys = [number.to_bytes(32, "big") for number in range(150)]
    index = BlockIndex(SlotAllocator(2 * 150 * 4096), clock=lambda: 0.0, host_num_bytes=150 * 4096)
    answers = index.reserve("w", keys, 4096, ttl_s=1)
    assert all(index.seal("w", [answer.reservation_id for answer in answers], [1] * 150))
    (tier,) = index.lower.all
    while (move := tier.next_demotion()) is not None:
        tier.demoted(move, is_written=True)
    assert index.evict(150) == 150
    parts = []
    for moves, awaited in index.lower.promote(keys, 4096, [tier]):
        assert awaited == [move.row for move in moves]
        for move in moves:  # over before the next part is asked for
            index.lower.promoted(move, Promoted.DONE)
        index.check()
        parts.append(moves)
    assert len(parts) > 1 and [m.header.key for moves in parts for m in moves] == keys
    assert len(index.lookup("r", keys, 4096, ttl_s=1).offsets) == 150
