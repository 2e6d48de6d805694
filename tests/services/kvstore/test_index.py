"""The index: reservations, leases, expiry, eviction order, private and corrupt blocks."""

from __future__ import annotations

import pytest

from services.kvstore.arena import SlotAllocator
from services.kvstore.block import LeaseOutcome, Reserved, ReserveOutcome
from services.kvstore.index import BlockIndex

SIZE = 4096
HELD, EXPIRED = LeaseOutcome.HELD, LeaseOutcome.EXPIRED


class Clock:
    """A clock that tests turn by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Store:
    """An index of a few slots, with short words for long sequences; checks after each of them."""

    def __init__(self, num_slots: int = 4) -> None:
        self.clock = Clock()
        self.slots = SlotAllocator(num_slots * SIZE)
        self.index = BlockIndex(self.slots, clock=self.clock)

    def reserve(
        self, keys: str, *, owner: str = "w", ttl_s: float = 10, private: bool = False
    ) -> list[Reserved]:
        answers = self.index.reserve(
            owner, [key.encode() for key in keys], SIZE, ttl_s=ttl_s, is_private=private
        )
        self.index.check()
        return answers

    def put(self, keys: str, *, private: bool = False) -> list[int]:
        ids = [answer.reservation_id for answer in self.reserve(keys, private=private)]
        assert self.index.seal("w", ids, range(len(ids))) == [True] * len(ids)
        self.index.check()
        return ids

    def lookup(self, keys: str, *, ttl_s: float = 10) -> tuple[int, int]:
        leased = self.index.lookup("r", [key.encode() for key in keys], SIZE, ttl_s=ttl_s)
        self.index.check()
        return leased.lease_id, len(leased.blocks)

    def release(self, lease_id: int) -> LeaseOutcome:
        outcome = self.index.release("r", lease_id)
        self.index.check()
        return outcome

    def sealed(self, keys: str) -> str:
        """Those of the keys that are sealed, without touching their order of use."""
        return "".join(k for k in keys if self.index._blocks.get(k.encode()) is not None)


def outcomes(answers: list[Reserved]) -> list[str]:
    return [answer.outcome.name for answer in answers]


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


def test_a_foreign_release_does_not_end_the_lease() -> None:
    store = Store()
    store.put("a")
    lease, _ = store.lookup("a")
    assert store.index.release("other", lease) is EXPIRED
    assert store.release(lease) is HELD


def test_leaves_go_before_parents_and_old_before_new() -> None:
    store = Store(num_slots=4)
    store.put("ab")
    store.put("xy")
    store.put("c")
    assert store.sealed("abxyc") == "axyc"
    store.put("d")
    assert store.sealed("axycd") == "xycd"


def test_lookup_refreshes_the_order_of_use() -> None:
    store = Store(num_slots=2)
    store.put("a")
    store.put("b")
    store.release(store.lookup("a")[0])
    store.put("c")
    assert store.sealed("abc") == "ac"


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


def test_parent_edges_never_form_a_cycle() -> None:
    store = Store(num_slots=2)
    store.put("ab")
    store.index.drop_corrupt([b"a"])
    (_, a) = store.reserve("ba")
    store.index.seal("w", [a.reservation_id], [0])
    assert store.index.evict(2) == 2
    store.index.check()


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
