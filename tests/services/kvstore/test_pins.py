"""Pinned blocks stay, as long as and no longer than was promised."""

from __future__ import annotations

import pytest

from services.kvstore.disk_format import DIGEST_UNIT, file_num_bytes
from services.kvstore.tiers import Promoted
from tests.services.kvstore.promotions import promote
from tests.services.kvstore.small_store import SIZE, Store, outcomes

assert SIZE % DIGEST_UNIT == 0


def test_a_pinned_block_is_not_evicted() -> None:
    store = Store(num_slots=2)
    store.put("a")
    store.put("b")
    assert store.pin("a")[0] == 1
    store.put("c")
    assert store.sealed("abc") == "ac"
    assert store.index.evict(9) == 1 and store.sealed("abc") == "a"


def test_the_prefix_that_the_store_has_is_pinned() -> None:
    store = Store(num_slots=6)
    store.put("ab")
    store.put("d")
    store.put("p", private=True)
    store.reserve("e")
    assert store.pin("abcd")[0] == 2
    assert store.pin("x") == (0, 0)
    assert store.pin("p") == (0, 0), "a private block was pinned"
    assert store.pin("e") == (0, 0), "an unsealed block was pinned"
    assert store.index.counts().num_pins == 1


def test_no_more_than_a_share_of_the_arena_is_pinned() -> None:
    store = Store(num_slots=6)
    store.put("abcdef")
    assert store.pin("abcdef")[0] == 3
    assert store.index.counts().pinned_num_bytes == 3 * SIZE
    assert store.pin("abcdef")[0] == 3, "what is pinned may be pinned again"
    assert store.pin("f") == (0, 0)
    assert store.pin("ababab")[0] == 6
    assert store.index.counts().pinned_num_bytes == 3 * SIZE


def test_a_block_stays_while_any_of_its_pins_lives() -> None:
    store = Store(num_slots=2)
    store.put("a")
    _, first = store.pin("a", ttl_s=5)
    store.clock.now += 4
    _, second = store.pin("a", ttl_s=5)
    assert not store.unpin(first, owner="another")
    store.clock.now += 4
    assert not store.unpin(first), "it has expired"
    assert store.index.evict(1) == 0
    assert store.unpin(second) and not store.unpin(second)
    assert store.index.evict(1) == 1


def test_a_pin_ends_with_its_deadline_and_with_its_owner() -> None:
    store = Store(num_slots=4)
    store.put("ab")
    store.pin("a", ttl_s=5)
    store.pin("ab", owner="gone", ttl_s=50)
    store.clock.now += 5
    assert store.index.evict(2) == 0
    store.index.disconnect("gone")
    store.index.check()
    assert store.index.counts().num_pins == 0 and store.index.counts().pinned_num_bytes == 0
    assert store.index.evict(2) == 2


def test_a_corrupt_block_goes_though_it_is_pinned() -> None:
    store = Store(num_slots=4)
    store.put("ab")
    _, pin_id = store.pin("ab")
    lease_id, _ = store.lookup("ab")
    assert store.index.drop_corrupt([b"a"]) == 1
    store.index.check()
    assert store.index.counts().pinned_num_bytes == SIZE
    store.put("a")
    assert store.unpin(pin_id)
    store.release(lease_id)
    assert store.index.evict(9) == 2


@pytest.mark.parametrize("is_promoted", [False, True])
def test_a_block_that_is_only_on_disk_stays_there(is_promoted: bool) -> None:
    store = Store(num_slots=4, disk_num_bytes=2 * file_num_bytes(SIZE))
    store.put("a")
    store.demote()
    store.index.evict(1)
    assert store.pin("a")[0] == 1
    if is_promoted:
        ((move,), _) = store.promote("a")
        store.index.lower.promoted(move, Promoted.DONE)
        store.index.lower.settle(move)
        assert store.index.evict(1) == 0, "it is pinned in memory now"
    for key in "bcd":
        store.put(key)
        store.demote()
    removed = [key.rstrip(b"\0") for key in store.disk.take_removed()]
    assert (b"a" in removed) is is_promoted, "its copy may go while it is in memory"
    assert store.pin("a")[0] == 1


def test_a_pinned_block_on_disk_is_not_written_anew() -> None:
    store = Store(num_slots=4, disk_num_bytes=2 * file_num_bytes(SIZE))
    store.put("a")
    store.demote()
    store.index.evict(1)
    store.pin("a")
    assert outcomes(store.reserve("a")) == ["ALREADY_SEALED"]


def test_a_pinned_block_that_the_disk_lost_is_forgotten() -> None:
    store = Store(num_slots=4, disk_num_bytes=2 * file_num_bytes(SIZE))
    store.put("a")
    store.demote()
    store.index.evict(1)
    _, pin_id = store.pin("a")
    ((move,), _) = store.promote("a")
    store.index.lower.promoted(move, Promoted.UNUSABLE)
    store.index.check()
    assert store.index.counts().pinned_num_bytes == 0
    assert store.unpin(pin_id)


def test_a_pinned_block_keeps_its_last_place_in_whichever_tier() -> None:
    store = Store(num_slots=4, host_num_bytes=SIZE, disk_num_bytes=file_num_bytes(SIZE))
    store.put("a")
    store.demote()
    store.index.evict(1)
    _, pin_id = store.pin("a")
    assert [tier.num_blocks for tier in store.index.lower.all] == [1, 1]
    store.put("b")
    store.demote()
    counts = store.index.counts()
    assert (counts.num_in_host, counts.num_on_disk) == (1, 1)
    assert store.disk.take_removed() == [], "DRAM gave its copy away, so the disk keeps its own"
    assert store.pin("a")[0] == 1
    assert store.unpin(pin_id)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_pinned_block_is_forgotten_with_its_last_copy_only(tier: str) -> None:
    store = Store(num_slots=4, host_num_bytes=SIZE, disk_num_bytes=file_num_bytes(SIZE))
    store.put("a")
    store.demote()
    store.index.evict(1)
    store.pin("a")
    source = getattr(store.index.lower, tier)
    ((move,), _) = promote(store.index.lower, [b"a"], SIZE, [source])
    store.index.lower.promoted(move, Promoted.UNUSABLE)
    store.index.check()
    assert store.index.counts().pinned_num_bytes == SIZE
    ((move,), _) = store.promote("a")
    assert move.tier is not source
    store.index.lower.promoted(move, Promoted.UNUSABLE)
    store.index.check()
    assert store.index.counts().pinned_num_bytes == 0


def test_a_block_that_waits_in_dram_alone_is_pinned_there() -> None:
    store = Store(num_slots=4, host_num_bytes=SIZE)
    store.put("a")
    store.demote()
    store.index.evict(1)
    store.pin("a")
    store.put("b")
    store.demote()
    assert store.index.counts().num_in_host == 1 and store.pin("a")[0] == 1
    store.index.disconnect("p")
    store.put("c")
    store.demote()
    assert store.pin("a") == (0, 0), "nothing keeps it any more"
