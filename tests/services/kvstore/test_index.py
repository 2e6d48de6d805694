"""The index: reservations, leases, expiry, private and corrupt blocks."""

from __future__ import annotations

from services.kvstore.block import LeaseOutcome
from tests.services.kvstore.small_store import SIZE, Store, outcomes

HELD, EXPIRED = LeaseOutcome.HELD, LeaseOutcome.EXPIRED


def test_reserve_seal_lookup_release() -> None:
    store = Store()
    store.put("abc")
    lease, num_blocks = store.lookup("abcd")
    assert lease and num_blocks == 3
    assert store.release(lease) is HELD
    assert store.release(lease) is EXPIRED
    assert store.index.counts().num_leases == 0


def test_an_unsealed_block_is_not_read_and_hides_its_children() -> None:
    store = Store()
    (a, b) = store.reserve("ab")
    assert store.lookup("ab") == (0, 0)
    store.index.seal("w", [b.reservation_id], [1])
    assert store.lookup("ab") == (0, 0)
    store.index.seal("w", [a.reservation_id], [1])
    assert store.lookup("ab")[1] == 2


def test_another_size_does_not_match() -> None:
    store = Store()
    store.put("a")
    assert store.index.lookup("r", [b"a"], SIZE // 2, ttl_s=1).lease_id == 0


def test_repeated_reserve_tells_what_exists() -> None:
    store = Store()
    store.put("a")
    assert outcomes(store.reserve("abb")) == ["ALREADY_SEALED", "RESERVED", "ALREADY_RESERVED"]


def test_seal_twice_is_harmless_and_foreign_seal_refused() -> None:
    store = Store()
    (a,) = store.reserve("a")
    assert store.index.seal("other", [a.reservation_id], [5]) == [False]
    assert store.index.seal("w", [a.reservation_id, 999], [5, 5]) == [True, False]
    assert store.index.seal("w", [a.reservation_id], [5]) == [True]
    assert store.index.seal("w", [a.reservation_id], [6]) == [False]
    assert store.index.seal("other", [a.reservation_id], [5]) == [False]


def test_an_expired_reservation_is_quarantined_until_acknowledged() -> None:
    store = Store(num_slots=1)
    (a,) = store.reserve("a", ttl_s=5)
    store.clock.now += 5
    assert store.index.seal("w", [a.reservation_id], [1]) == [False]
    assert store.index.counts().num_quarantined == 1
    assert outcomes(store.reserve("b")) == ["FULL"]
    assert store.index.acknowledge("other", [a.reservation_id]) == 0
    assert store.index.acknowledge("w", [a.reservation_id]) == 1
    assert store.index.acknowledge("w", [a.reservation_id]) == 0
    assert outcomes(store.reserve("b")) == ["RESERVED"]


def test_a_silent_writer_is_presumed_dead_in_the_end() -> None:
    store = Store(num_slots=1)
    store.reserve("a", ttl_s=5)
    store.clock.now += 5
    store.index.expire()
    store.clock.now += 119
    assert outcomes(store.reserve("b")) == ["FULL"]
    store.clock.now += 1
    assert outcomes(store.reserve("b")) == ["RESERVED"]


def test_disconnect_frees_only_the_owners_things() -> None:
    store = Store()
    store.reserve("a", ttl_s=1)
    store.clock.now += 2
    store.reserve("b")
    store.reserve("c", owner="other")
    store.index.disconnect("w")
    store.index.check()
    counts = store.index.counts()
    assert (counts.num_reserved, counts.num_quarantined) == (1, 0)


def test_acknowledging_a_live_reservation_frees_its_key() -> None:
    store = Store()
    (a,) = store.reserve("a")
    assert store.index.acknowledge("w", [a.reservation_id]) == 1
    assert outcomes(store.reserve("a")) == ["RESERVED"]
    assert store.index.seal("w", [a.reservation_id], [1]) == [False]


def test_an_expired_lease_answers_expired() -> None:
    store = Store()
    store.put("a")
    lease, _ = store.lookup("a", ttl_s=3)
    store.clock.now += 3
    assert store.release(lease) is EXPIRED
    expired = {"lease": 1, "reservation": 0, "pin": 0}
    assert store.index.counts().num_expired == expired
    store.reserve("b", ttl_s=3)
    store.clock.now += 3
    store.index.expire()
    assert store.index.counts().num_expired == expired | {"reservation": 1}


def test_a_foreign_release_does_not_end_the_lease() -> None:
    store = Store()
    store.put("a")
    lease, _ = store.lookup("a")
    assert store.index.release("other", lease) is EXPIRED
    assert store.release(lease) is HELD


def test_a_dropped_block_keeps_its_slot_while_leased() -> None:
    store = Store(num_slots=1)
    store.put("a")
    lease, _ = store.lookup("a")
    assert store.index.drop_corrupt([b"a", b"zzz"]) == 1
    assert store.lookup("a") == (0, 0)
    assert outcomes(store.reserve("b")) == ["FULL"]
    assert store.release(lease) is HELD
    assert outcomes(store.reserve("b")) == ["RESERVED"]


def test_a_dropped_block_comes_free_when_the_lease_expires() -> None:
    store = Store(num_slots=1)
    store.put("a")
    lease, _ = store.lookup("a", ttl_s=3)
    store.index.drop_corrupt([b"a"])
    store.clock.now += 3
    assert outcomes(store.reserve("b")) == ["RESERVED"]
    assert store.release(lease) is EXPIRED


def test_a_private_block_leaves_with_its_lease() -> None:
    store = Store(num_slots=1)
    store.put("p", private=True)
    assert store.index.counts().num_private == 1
    assert outcomes(store.reserve("b")) == ["FULL"]
    lease, num_blocks = store.lookup("p")
    assert num_blocks == 1
    assert store.release(lease) is HELD
    assert store.index.counts().num_private == 0
    assert outcomes(store.reserve("b")) == ["RESERVED"]


def test_two_readers_of_a_private_block_both_hold() -> None:
    store = Store(num_slots=1)
    store.put("p", private=True)
    first, second = store.lookup("p")[0], store.lookup("p")[0]
    assert store.release(first) is HELD
    assert outcomes(store.reserve("b")) == ["FULL"]
    assert store.release(second) is HELD
    assert outcomes(store.reserve("b")) == ["RESERVED"]


def test_an_unread_private_block_expires() -> None:
    store = Store(num_slots=1)
    store.put("p", private=True)
    store.clock.now += 120
    assert store.lookup("p") == (0, 0)
    assert store.index.counts().num_private == 0


def test_discard_drops_private_blocks_only() -> None:
    store = Store()
    store.put("a")
    store.put("p", private=True)
    assert store.index.discard([b"a", b"p", b"q"]) == 1
    assert store.sealed("ap") == "a"
