"""A tenant that uses too much pays with its own blocks."""

from __future__ import annotations

import pytest

from services.kvstore.disk_format import file_num_bytes
from services.kvstore.eviction import TenantLeaves
from services.kvstore.tenants import SHARED, tenant_number
from services.kvstore.tiers import Promoted
from tests.services.kvstore.small_store import SIZE, Store, outcomes


def test_a_tenant_over_its_quota_evicts_its_own_least_recently_used() -> None:
    store = Store(num_slots=8, tenant_num_bytes=2 * SIZE)
    store.put("x", tenant="other")
    store.put("a", tenant="t")
    store.put("b", tenant="t")
    store.release(store.lookup("a")[0])
    store.put("c", tenant="t")
    assert store.sealed("xabc") == "xac", "the oldest of all is another's"
    assert store.index.counts().num_evicted == {"room": 0, "quota": 1}
    store.put("y", tenant="other")
    assert store.sealed("xyac") == "xyac"


@pytest.mark.parametrize("tenant", ["t", ""])
def test_a_tenant_whose_blocks_are_all_needed_is_full(tenant: str) -> None:
    store = Store(num_slots=8, tenant_num_bytes=2 * SIZE)
    store.put("x", tenant="other")
    store.put("ab", tenant=tenant)
    lease_id, _ = store.lookup("ab")
    assert outcomes(store.reserve("c", tenant=tenant)) == ["FULL"]
    assert store.sealed("xab") == "xab"
    store.release(lease_id)
    assert outcomes(store.reserve("c", tenant=tenant)) == ["RESERVED"]
    assert store.sealed("xab") == "xa"


def test_a_block_larger_than_the_quota_evicts_nothing() -> None:
    store = Store(num_slots=8, tenant_num_bytes=SIZE)
    store.put("a", tenant="t")
    (answer,) = store.index.reserve("w", [b"b"], 2 * SIZE, ttl_s=1, tenant="t")
    assert outcomes([answer]) == ["FULL"] and store.sealed("a") == "a"


def test_a_tenant_below_its_quota_evicts_the_least_recently_used_of_all() -> None:
    store = Store(num_slots=3, tenant_num_bytes=2 * SIZE)
    store.put("xy", tenant="other")
    store.put("a", tenant="t")
    store.put("b", tenant="t")
    assert store.sealed("xyab") == "xab"


def test_blocks_that_were_reserved_and_left_do_not_count() -> None:
    store = Store(num_slots=8, tenant_num_bytes=2 * SIZE)
    (answer, _) = store.reserve("ab", tenant="t", ttl_s=1)
    assert outcomes(store.reserve("c", tenant="t")) == ["FULL"]
    store.index.acknowledge("w", [answer.reservation_id])
    assert outcomes(store.reserve("cd", tenant="t")) == ["RESERVED", "FULL"]
    store.clock.now += 60
    store.index.expire()
    assert outcomes(store.reserve("cd", tenant="t")) == ["RESERVED", "RESERVED"]


def test_a_dropped_block_counts_until_its_last_reader_has_gone() -> None:
    store = Store(num_slots=8, tenant_num_bytes=SIZE)
    store.put("a", tenant="t")
    lease_id, _ = store.lookup("a")
    store.index.drop_corrupt([b"a"])
    assert outcomes(store.reserve("b", tenant="t")) == ["FULL"]
    store.release(lease_id)
    assert outcomes(store.reserve("b", tenant="t")) == ["RESERVED"]


def test_a_block_that_comes_back_from_disk_counts_again() -> None:
    store = Store(num_slots=8, tenant_num_bytes=SIZE, disk_num_bytes=8 * file_num_bytes(SIZE))
    store.put("a", tenant="t")
    move = store.disk.next_demotion()
    assert move is not None
    store.disk.demoted(move, is_written=True)
    store.put("b", tenant="t")
    assert store.sealed("ab") == "b"
    ((move,), _) = store.promote("a")
    store.index.lower.promoted(move, Promoted.DONE)
    store.index.lower.settle(move)
    store.index.check()
    assert store.sealed("ab") == "a"


def test_a_row_that_changes_its_tenant_is_listed_for_the_new_one() -> None:
    store = Store(num_slots=8, tenant_num_bytes=SIZE)
    for turn in range(6):
        store.put("a", tenant=f"t{turn % 2}")
        store.put("b", tenant=f"t{turn % 2}")  # takes the place of a
        assert store.sealed("ab") == "b"
        assert store.index.evict(1) == 1


def test_a_tenants_order_does_not_grow_with_what_it_lost() -> None:
    store = Store(num_slots=2, tenant_num_bytes=2 * SIZE)
    store.put("x", tenant="t")
    for turn in range(3000):
        tenant = "tu"[turn % 2]
        (answer,) = store.index.reserve("w", [b"a"], SIZE, ttl_s=1, tenant=tenant)
        store.index.seal("w", [answer.reservation_id], [0])
        store.release(store.index.lookup("r", [b"x"], SIZE, ttl_s=1).lease_id)
        assert store.index.evict(1) == 1 and store.sealed("xa") == "x"
    store.index.check()
    leaves = store.index._memory.leaves
    assert isinstance(leaves, TenantLeaves)
    assert all(len(queue._heap) < 1100 for queue in leaves._queues.values())


def test_tenants_without_blocks_cost_nothing() -> None:
    store = Store(num_slots=2, tenant_num_bytes=SIZE)
    for number in range(50):
        store.put(chr(100 + number), tenant=f"t{number}")
    memory = store.index._memory
    assert isinstance(memory.leaves, TenantLeaves)
    assert len(memory.tenants.num_bytes) == len(memory.leaves._queues) == 2


def test_without_a_quota_tenants_are_only_counted() -> None:
    store = Store(num_slots=4)
    store.put("abcd", tenant="t")
    assert store.index._memory.tenants.num_bytes == {tenant_number("t"): 4 * SIZE}


def test_no_name_is_the_shared_tenant() -> None:
    assert tenant_number("") == SHARED
    assert len({SHARED, tenant_number("t"), tenant_number("u")}) == 3
