"""Memory and disk in random order, with contents: no key is ever answered with another's bytes.

The world here plays the threads: it copies contents when a move is told to have ended, and may fail
it. It keeps no model of what must be evicted; the index's own check() proves the books.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from services.kvstore.arena import SlotAllocator
from services.kvstore.block import LeaseOutcome, ReserveOutcome
from services.kvstore.disk import Move, Promoted
from services.kvstore.disk_format import Header, file_num_bytes
from services.kvstore.index import BlockIndex
from tests.services.kvstore.watched_world import Follower, sealed_keys

SIZE, NUM_SLOTS, NUM_FILES = 4096, 5, 6
KEYS = st.lists(st.sampled_from([bytes([65 + i]) * 32 for i in range(8)]), min_size=1, max_size=4)
TTLS = st.sampled_from([1.0, 4.0, 1000.0])
TENANTS = st.sampled_from(["", "tenant"])
Draw = Callable[[st.SearchStrategy[Any]], Any]


class TierMachine(RuleBasedStateMachine):
    """`slots` and `files` are what lies where; a content is the key that was written.

    It has one rule because Hypothesis leaves out a random half of the rules in each example.
    """

    reached: ClassVar[Counter[str] | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.slots: dict[int, bytes] = {}
        self.files: dict[bytes, bytes] = {}
        self.leases: dict[int, dict[int, bytes]] = {}
        self.writes: list[Move] = []
        self.reads: list[Move] = []
        self.arrived: list[Move] = []
        self.pinned: dict[int, set[bytes]] = {}
        self.follower = Follower()
        self.index = self.fresh_index(first_id=1)
        self.follower.begin(self.index, "1")

    def fresh_index(self, first_id: int) -> BlockIndex:
        return BlockIndex(
            SlotAllocator(NUM_SLOTS * SIZE),
            clock=lambda: self.now,
            private_ttl_s=20,
            quarantine_s=30,
            first_id=first_id,
            disk_num_bytes=NUM_FILES * file_num_bytes(SIZE),
            tenant_num_bytes=4 * SIZE,
            num_changes=16,
        )

    @rule(data=st.data())
    def do(self, data: st.DataObject) -> None:
        steps = ["write", "begin_demotion", "look_up", "take_away", "write", "begin_demotion"]
        steps += ["end_demotion"] * 3 * bool(self.writes)
        steps += ["begin_promotion"] * 3 * bool(self.files)
        steps += ["end_promotion"] * 3 * bool(self.reads)
        steps += ["settle"] * bool(self.arrived) + ["release"] * bool(self.leases)
        steps += ["pin"] + ["unpin"] * 2 * bool(self.pinned)
        steps += ["pass_time"] + ["restart"] * 2 * (len(self.files) > 1)
        getattr(self, data.draw(st.sampled_from(steps)))(data.draw)

    def write(self, draw: Draw) -> None:
        """Reserves, writes, and seals (s), acknowledges (a) or does neither (x)."""
        keys, ttl_s, fate = draw(KEYS), draw(TTLS), draw(st.sampled_from("ssssssax"))
        is_private = draw(st.sampled_from([False, False, True]))
        answers = self.index.reserve(
            "w", keys, SIZE, ttl_s=ttl_s, is_private=is_private, tenant=draw(TENANTS)
        )
        ids: list[int] = []
        for key, answer in zip(keys, answers, strict=True):
            if answer.outcome is ReserveOutcome.RESERVED:
                assert answer.offset not in {m.offset for m in self.moves()}, "a slot in two hands"
                assert not any(answer.offset in lease for lease in self.leases.values())
                self.slots[answer.offset] = key
                ids.append(answer.reservation_id)
        if fate == "s":
            digests = [self.slots[a.offset][0] for a in answers if a.reservation_id]
            assert self.index.seal("w", ids, digests) == [True] * len(ids)
        elif fate == "a":
            assert self.index.acknowledge("w", ids) == len(ids)

    def look_up(self, draw: Draw) -> None:
        keys = draw(KEYS)
        leased = self.index.lookup("r", keys, SIZE, ttl_s=draw(TTLS))
        blocks = list(zip(keys, leased.blocks, strict=False))
        assert all(self.slots[b.offset] == key and b.digest == key[0] for key, b in blocks)
        if leased.lease_id:
            self.leases[leased.lease_id] = {b.offset: key for key, b in blocks}

    def release(self, draw: Draw) -> None:
        lease_id = draw(st.sampled_from(sorted(self.leases)))
        lent = self.leases.pop(lease_id)
        if self.index.release("r", lease_id) is LeaseOutcome.HELD:
            assert all(self.slots[offset] == key for offset, key in lent.items())

    def pin(self, draw: Draw) -> None:
        keys = [*draw(KEYS), *sorted(self.files)[:1]]
        num_pinned, pin_id = self.index.pin("p", keys, ttl_s=1000.0)
        if num_pinned:
            self.pinned[pin_id] = set(keys[:num_pinned])
            self.note("pinned on disk" if self.pinned[pin_id] & set(self.files) else "pinned")

    def unpin(self, draw: Draw) -> None:
        pin_id = draw(st.sampled_from(sorted(self.pinned)))
        del self.pinned[pin_id]
        assert self.index.unpin("p", pin_id)

    def begin_demotion(self, draw: Draw) -> None:
        move = self.index.disk.next_demotion()
        self.remove_files()
        if move is not None:
            assert move.header.key not in self.files, "a file is written twice"
            self.writes.append(move)

    def end_demotion(self, draw: Draw) -> None:
        move = self.writes.pop(draw(st.integers(0, len(self.writes) - 1)))
        is_written = draw(st.sampled_from([True, True, False]))
        self.note(f"demoted {is_written}")
        assert self.slots[move.offset] == move.header.key, "a slot was reused while it was copied"
        if is_written:
            self.files[move.header.key] = self.slots[move.offset]
        was_there = self.index.lookup("r", [move.header.key], SIZE, ttl_s=0).lease_id
        self.index.disk.demoted(move, is_written)
        if not was_there:
            self.note("dropped while it was copied")

    def begin_promotion(self, draw: Draw) -> None:
        keys = [*draw(st.permutations(sorted(self.files)))[:2], *draw(KEYS)]
        moves, awaited = self.index.disk.promote(keys, SIZE)
        assert {move.row for move in moves} <= set(awaited)
        for move in moves:
            assert self.files[move.header.key] == move.header.key
            self.slots[move.offset] = b"half read"
        self.reads += moves

    def end_promotion(self, draw: Draw) -> None:
        move = self.reads.pop(draw(st.integers(0, len(self.reads) - 1)))
        outcome = draw(st.sampled_from([Promoted.DONE, *Promoted]))
        self.note(outcome.name)
        assert self.slots[move.offset] == b"half read", "a slot was reused while it was read into"
        if outcome is Promoted.DONE:
            self.slots[move.offset] = self.files[move.header.key]
            self.arrived.append(move)
        self.index.disk.promoted(move, outcome)
        if outcome is Promoted.UNUSABLE:
            self.lose_pins([move.header.key])

    def settle(self, draw: Draw) -> None:
        move = self.arrived.pop()
        assert self.slots[move.offset] == move.header.key, "a held slot was reused"
        self.index.disk.settle(move)

    def take_away(self, draw: Draw) -> None:
        keys, how = draw(KEYS), draw(st.sampled_from(["drop_corrupt", "discard", "evict", "evict"]))
        if how == "evict":
            before = self.index.counts()
            num_evicted = self.index.evict(len(keys))
            if num_evicted and self.index.counts().num_on_disk == before.num_on_disk > 0:
                self.note("evicted to disk")
        else:
            getattr(self.index, how)(keys)
            if how == "drop_corrupt":
                assert not self.index.lookup("r", keys[:1], SIZE, ttl_s=1).lease_id
                self.lose_pins(keys)

    def pass_time(self, draw: Draw) -> None:
        self.now += draw(st.sampled_from([0.5, 2.0, 10.0, 40.0]))
        self.index.expire()
        if not self.index.counts().num_pins:
            self.pinned.clear()
        self.leases.clear()  # some have expired; none is asked about any more

    def restart(self, draw: Draw) -> None:
        """What is on disk comes back, and nothing else."""
        if self.writes or self.reads:
            return
        self.note("restarted with files" if self.files else "restarted")
        self.remove_files()
        self.index = self.fresh_index(first_id=1000)
        keys = self.files
        self.index.disk.load([Header(key=k, num_bytes=SIZE, digest=k[0]) for k in keys])
        self.slots, self.leases, self.arrived, self.pinned = {}, {}, [], {}
        self.follower.begin(self.index, "2")
        assert self.index.counts().num_on_disk == len(self.files)

    @invariant()
    def books_agree(self) -> None:
        self.remove_files()
        self.index.check()
        counts = self.index.counts()
        assert counts.num_on_disk == len(self.files) <= NUM_FILES
        assert counts.num_promoting == len(self.reads)
        there = sealed_keys(self.index) | set(self.files)
        assert self.follower.catch_up() == there, "a watcher knows other keys"
        assert set().union(*self.pinned.values()) <= there, "a pinned block was evicted"

    def lose_pins(self, keys: list[bytes]) -> None:
        """Corrupt blocks go, pinned or not; those that are only on disk are not asked about."""
        self.remove_files()
        for pinned in self.pinned.values():
            pinned -= set(keys) - sealed_keys(self.index) - set(self.files)

    def moves(self) -> list[Move]:
        return [*self.writes, *self.reads, *self.arrived]

    def remove_files(self) -> None:
        for key in self.index.disk.take_removed():
            del self.files[key]
            self.note("removed")

    def note(self, what: str) -> None:
        if self.reached is not None:
            self.reached[what] += 1


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_the_machine_reaches_what_it_is_about() -> None:
    reached: Counter[str] = Counter()
    run_state_machine_as_test(
        type("Noting", (TierMachine,), {"reached": reached}),
        settings=settings(
            max_examples=100,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
        ),
    )
    assert set(reached) >= {
        "demoted True",
        "demoted False",
        "DONE",
        "UNUSABLE",
        "ABANDONED",
        "removed",
        "restarted with files",
        "evicted to disk",
        "dropped while it was copied",
        "pinned on disk",
    }, reached
