"""Who goes when room is needed: least recently used, unleased, leaves before parents."""

from __future__ import annotations

import pytest

from services.kvstore.arena import SlotAllocator
from services.kvstore.block import ReserveOutcome
from services.kvstore.index import BlockIndex
from tests.services.kvstore.small_store import SIZE, Clock, Store, outcomes


def test_leaves_go_before_parents_and_old_before_new() -> None:
    store = Store(num_slots=4)
    store.put("ab")
    store.put("xy")
    store.put("c")
    assert store.sealed("abxyc") == "axyc"
    store.put("d")
    assert store.sealed("axycd") == "xycd"
    assert store.index.counts().num_evicted == {"room": 2, "quota": 0}


def test_lookup_refreshes_the_order_of_use() -> None:
    store = Store(num_slots=2)
    store.put("a")
    store.put("b")
    store.release(store.lookup("a")[0])
    store.put("c")
    assert store.sealed("abc") == "ac"


def test_an_order_of_use_that_changed_entirely_is_followed() -> None:
    num_blocks = 3000
    index = BlockIndex(SlotAllocator(num_blocks * SIZE), clock=Clock())
    keys = [b"%032d" % n for n in range(num_blocks)]
    for key in keys:
        (answer,) = index.reserve("w", [key], SIZE, ttl_s=10)
        index.seal("w", [answer.reservation_id], [0])
    for key in reversed(keys):
        index.release("r", index.lookup("r", [key], SIZE, ttl_s=10).lease_id)
    assert index.evict(2000) == 2000
    index.check()
    is_there = [bool(index.lookup("r", [key], SIZE, ttl_s=10).lease_id) for key in keys]
    assert is_there == [True] * 1000 + [False] * 2000


def test_the_end_of_a_looked_up_chain_goes_before_its_start() -> None:
    store = Store(num_slots=2)
    store.put("a")
    store.put("b")
    store.release(store.lookup("ab")[0])
    assert store.index.evict(1) == 1
    assert store.sealed("ab") == "a"


def test_a_full_store_of_leased_blocks_refuses() -> None:
    store = Store(num_slots=2)
    store.put("ab")
    lease, _ = store.lookup("ab")
    assert outcomes(store.reserve("cd")) == ["FULL", "FULL"]
    store.release(lease)
    assert outcomes(store.reserve("cd")) == ["RESERVED", "RESERVED"]


def test_a_chain_does_not_evict_its_own_prefix() -> None:
    store = Store(num_slots=3)
    store.put("ab")
    assert outcomes(store.reserve("abcd")) == [
        "ALREADY_SEALED",
        "ALREADY_SEALED",
        "RESERVED",
        "FULL",
    ]


def test_a_parent_that_was_dropped_and_came_back_still_goes_after_its_children() -> None:
    store = Store(num_slots=3)
    store.put("ab")
    lease, _ = store.lookup("a")
    store.index.drop_corrupt([b"a"])
    store.put("a")
    store.release(lease)
    store.release(store.lookup("b")[0])
    assert store.index.evict(1) == 1
    store.index.check()
    assert store.sealed("ab") == "a"


def test_parent_edges_never_form_a_cycle() -> None:
    store = Store(num_slots=2)
    store.put("ab")
    store.index.drop_corrupt([b"a"])
    (_, a) = store.reserve("ba")
    store.index.seal("w", [a.reservation_id], [0])
    assert store.index.evict(2) == 2
    store.index.check()


@pytest.mark.parametrize("pin", [False, True])
def test_another_block_size_takes_over_only_if_it_can(pin: bool) -> None:
    store = Store(num_slots=4)
    store.put("a")
    store.put("b")
    store.put("c")
    store.put("d")
    if pin:
        for key in "bc":
            store.lookup(key)
    answers = store.index.reserve("w", [b"BIG"], 3 * SIZE, ttl_s=10)
    store.index.check()
    assert answers[0].outcome is (ReserveOutcome.FULL if pin else ReserveOutcome.RESERVED)
    assert store.sealed("abcd") == ("abcd" if pin else "d")
