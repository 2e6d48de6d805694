"""Blocks on disk and back, over real files and threads: right bytes or none, and never late."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.kvstore import lower_tier
from services.kvstore.carrier import DISK_PACE
from services.kvstore.disk_format import HEADER_NUM_BYTES
from tests.services.kvstore.tiered_store import PATIENCE_S, SIZE, TieredStore, keys_of

FAILURES, MOVES = "kvmesh.kv.verify.failures", "kvmesh.kv.tier.blocks"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[TieredStore]:
    made = await TieredStore.start(tmp_path / "disk")
    yield made
    await made.close()


async def test_what_memory_has_no_room_for_comes_back_from_disk(store: TieredStore) -> None:
    for names in ("abcd", "efgh", "ijkl", "mnop"):
        store.put(names)
        await store.until(lambda: not store.num_pending)
    assert store.index.counts().num_sealed == 8 and store.index.counts().num_on_disk == 16
    for names in ("abcd", "efgh", "ijkl", "mnop"):
        assert await store.look_up(names) == names
    assert store.counted(MOVES) == {"demoted": 16, "promoted": 16}


async def test_a_chain_of_which_some_is_in_memory_is_completed(store: TieredStore) -> None:
    await store.put_below("abcdef")
    assert await store.look_up("ab") == "ab"
    assert await store.look_up("abcdefz") == "abcdef"
    assert store.files.num_reads == 6


async def test_a_cold_key_asks_no_disk(store: TieredStore) -> None:
    await store.put_below("a")
    assert await store.look_up("xa") == ""
    assert store.files.num_reads == 0


async def test_a_restarted_store_has_what_was_on_disk(tmp_path: Path) -> None:
    first = await TieredStore.start(tmp_path)
    first.put("abcd")
    await first.until(lambda: not first.num_pending)
    await first.close()
    second = await TieredStore.start(tmp_path)
    assert second.index.counts().num_on_disk == 4
    assert await second.look_up("abcd") == "abcd"
    await second.close()


async def test_a_restart_with_less_room_keeps_what_was_used_last(tmp_path: Path) -> None:
    first = await TieredStore.start(tmp_path)
    for name in "abcd":
        await first.put_below(name)
    assert await first.look_up("a") == "a"
    await first.close()
    second = await TieredStore.start(tmp_path, num_files=2)
    await second.until(lambda: second.on_disk("abcd") == "ad")
    assert await second.look_up("a") == "a" and await second.look_up("d") == "d"
    await second.close()


async def test_a_torn_file_is_dropped_at_start_and_counted(tmp_path: Path) -> None:
    first = await TieredStore.start(tmp_path)
    await first.put_below("ab")
    path = first.path("b")
    await first.close()
    path.write_bytes(path.read_bytes()[:-1])
    second = await TieredStore.start(tmp_path)
    assert await second.look_up("ab") == "a"
    assert second.counted(FAILURES) == {"disk_start": 1} and not path.exists()
    await second.close()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[HEADER_NUM_BYTES + 5000] ^= 4
    path.write_bytes(data)


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("disk_digest", flip),
    ("disk_read", lambda path: path.write_bytes(path.read_bytes()[:5000])),
    ("disk_read", lambda path: path.unlink()),
    ("disk_header", lambda path: path.write_bytes(bytes(HEADER_NUM_BYTES + 8192))),
]


@pytest.mark.parametrize(("reason", "damage"), DAMAGES)
async def test_a_damaged_block_ends_the_prefix_and_is_forgotten(
    store: TieredStore, reason: str, damage: Callable[[Path], object]
) -> None:
    await store.put_below("abcd")
    damage(store.path("c"))
    assert await store.look_up("abcd") == "ab"
    assert store.counted(FAILURES) == {reason: 1}
    assert await store.look_up("abcd") == "ab" and store.files.num_reads == 4
    await store.until(lambda: store.on_disk("abcd") == "abd")
    store.put("c")
    assert await store.look_up("abcd") == "abcd"


async def test_a_lost_disk_costs_its_blocks_only(store: TieredStore) -> None:
    await store.put_below("ab")
    shutil.rmtree(store.files.directory)
    assert await store.look_up("ab") == ""
    store.put("cd")
    assert await store.look_up("cd") == "cd"
    await store.until(lambda: not store.num_pending or store.counted(FAILURES))
    assert store.counted(FAILURES)["disk_read"] == 2


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "disk_full"), (errno.EIO, "disk_write")]
)
async def test_a_disk_that_takes_nothing_is_left_alone_for_a_while(
    store: TieredStore, number: int, reason: str
) -> None:
    store.files.write_error = OSError(number, "no")
    store.put("a")
    await store.until(lambda: store.counted(FAILURES) == {reason: 1})
    store.files.write_error = None
    store.put("b")
    assert store.num_pending == 1, "the disk was asked again at once"
    store.now += 6
    store.mover.wake()
    await store.until(lambda: store.on_disk("ab") == "b")
    assert await store.look_up("a") == "a", "it is still in memory"


async def test_what_the_queue_has_no_room_for_is_lost_when_evicted(
    store: TieredStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower_tier, "MAX_QUEUED", 3)
    await store.put_below("abcde")
    assert await store.look_up("abcde") == "abc"
    assert store.counted(MOVES)["skipped"] == 2


async def test_private_blocks_never_reach_the_disk(store: TieredStore) -> None:
    store.put("p", is_private=True)
    await store.put_below("a")
    assert store.on_disk("ap") == "a"


async def test_the_disks_least_recently_used_go_when_it_is_full(tmp_path: Path) -> None:
    store = await TieredStore.start(tmp_path, num_slots=2, num_files=3)
    for name in "abc":
        await store.put_below(name)
    assert await store.look_up("a") == "a"
    await store.put_below("d")
    await store.until(lambda: store.on_disk("abcd") == "acd")
    await store.close()


async def test_a_lookup_that_may_not_wait_gets_what_is_in_memory(store: TieredStore) -> None:
    await store.put_below("abcd")
    assert await store.look_up("a") == "a"
    assert await store.look_up("abcd", max_wait_s=0) == "a"
    assert store.files.num_reads == 1


async def test_a_slow_disk_shortens_the_prefix_and_is_caught_up_with(store: TieredStore) -> None:
    await store.put_below("abcd")
    assert await store.look_up("a") == "a"
    store.files.gate.clear()
    assert await store.look_up("abcd", max_wait_s=0.01) == "a"
    assert store.index.counts().num_promoting == 3
    store.files.gate.set()
    await store.until(lambda: not store.index.counts().num_promoting)
    assert await store.look_up("abcd") == "abcd"


async def test_lookups_of_the_same_blocks_share_one_read(store: TieredStore) -> None:
    await store.put_below("abcd")
    store.files.gate.clear()
    both = [asyncio.ensure_future(store.look_up(names)) for names in ("abcd", "abc")]
    await store.until(lambda: store.files.num_reads)
    store.files.gate.set()
    assert await asyncio.wait_for(asyncio.gather(*both), PATIENCE_S) == ["abcd", "abc"]
    assert store.files.num_reads == 4


async def test_who_joins_an_abandoned_read_gets_all_of_it(store: TieredStore) -> None:
    await store.put_below("abcd")
    store.files.gate.clear()
    assert await store.look_up("abcd", max_wait_s=0.01) == ""
    second = asyncio.ensure_future(store.look_up("abcd"))
    await asyncio.sleep(0)
    store.files.gate.set()
    assert await asyncio.wait_for(second, PATIENCE_S) == "abcd"


async def test_a_cancelled_lookup_leaves_nothing_held(store: TieredStore) -> None:
    await store.put_below("abcd")
    store.files.gate.clear()
    lookup = asyncio.ensure_future(store.look_up("abcd"))
    await store.until(lambda: store.files.num_reads)
    lookup.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lookup
    store.files.gate.set()
    await store.until(lambda: not store.index.counts().num_promoting)
    assert store.index.counts().num_leases == 0
    store.index.evict(8)
    assert not store.index.counts().num_sealed, "a block is still held"


async def test_a_lookup_that_is_given_up_while_it_waits_gets_no_lease(store: TieredStore) -> None:
    await store.put_below("bcd")
    store.put("a")
    store.files.gate.clear()
    looking = store.mover.lookup(
        "r", keys_of("abcd"), SIZE, ttl_s=60, max_wait_s=PATIENCE_S, attempt=5
    )
    lookup = asyncio.ensure_future(looking)
    await store.until(lambda: store.files.num_reads)
    assert store.index.counts().num_leases == 1, "of what is in memory"
    store.index.give_up("r", [5])
    store.files.gate.set()
    assert not (await lookup).lease_id
    assert store.index.counts().num_leases == 0


async def test_promotions_take_half_of_the_memory_at_most(store: TieredStore) -> None:
    await store.put_below("abcdef")
    store.files.gate.clear()
    lookup = asyncio.ensure_future(store.look_up("abcdef"))
    await store.until(lambda: store.files.num_reads)
    assert store.index.counts().num_promoting == 4
    store.put("wxyz")
    store.files.gate.set()
    assert await asyncio.wait_for(lookup, PATIENCE_S) == "abcd"


async def test_lookups_do_not_wait_for_a_disk_that_hangs(store: TieredStore) -> None:
    await store.put_below("ab")
    store.files.gate.clear()
    assert await store.look_up("a", max_wait_s=0.01) == ""
    await store.until(lambda: store.files.num_reads)
    store.now += 6
    assert await asyncio.wait_for(store.look_up("b", max_wait_s=1000), PATIENCE_S) == ""
    assert store.files.num_reads == 1


async def test_a_corrupt_block_leaves_the_disk_too(store: TieredStore) -> None:
    store.put("ab")
    await store.until(lambda: store.on_disk("ab") == "ab")
    assert store.index.drop_corrupt(keys_of("b")) == 1
    store.mover.wake()
    await store.until(lambda: store.on_disk("ab") == "a")
    assert await store.look_up("ab") == "a"


async def test_closing_does_not_wait_for_what_is_queued(tmp_path: Path) -> None:
    store = await TieredStore.start(tmp_path, num_slots=32)
    await store.put_below("abcdefgh")
    store.files.gate.clear()
    lookups = [asyncio.ensure_future(store.look_up(name)) for name in "abcdefgh"]
    await store.until(lambda: store.files.num_reads == DISK_PACE.num_readers)
    assert store.index.counts().num_promoting == 8
    for lookup in lookups:
        lookup.cancel()
    await asyncio.gather(*lookups, return_exceptions=True)
    assert store.index.counts().num_promoting == DISK_PACE.num_readers, (
        "the queued were not given back"
    )
    await store.close()
