"""All tiers in random order, with contents: no key is ever answered with another's bytes.

The world here plays the threads: it copies contents when a move is told to have ended, and may fail
it. It keeps no model of what must be evicted; the index's own check() proves the books.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    invariant,
    rule,
    run_state_machine_as_test,
)

from services.kvstore.block import LeaseOutcome, ReserveOutcome
from services.kvstore.disk_format import Header
from services.kvstore.tiers import Promoted
from tests.services.kvstore.promotions import promote
from tests.services.kvstore.tiers_world import FLIPPED, NUM_FILES, NUM_HOST, SIZE, TiersWorld
from tests.services.kvstore.watched_world import sealed_keys

KEYS = st.lists(st.sampled_from([bytes([65 + i]) * 32 for i in range(8)]), min_size=1, max_size=4)
TTLS = st.sampled_from([1.0, 4.0, 1000.0])
TENANTS = st.sampled_from(["", "tenant"])
Draw = Callable[[st.SearchStrategy[Any]], Any]


class TierMachine(TiersWorld):
    """Every step of the store and of its threads at any time.

    It has one rule because Hypothesis leaves out a random half of the rules in each example.
    """

    @rule(data=st.data())
    def do(self, data: st.DataObject) -> None:
        steps = ["write", "begin_demotion", "look_up", "take_away", "write", "begin_demotion"]
        steps += ["end_demotion"] * 3 * bool(self.writes)
        steps += ["begin_promotion"] * 3 * bool(self.known())
        steps += ["end_promotion"] * 3 * bool(self.reads)
        steps += ["settle"] * bool(self.arrived) + ["release"] * bool(self.leases)
        steps += ["pin"] + ["unpin"] * 2 * bool(self.pinned)
        steps += ["pass_time"] + ["flip"] * bool(self.slots)
        steps += ["restart"] * 2 * (len(self.files) > 1)
        getattr(self, data.draw(st.sampled_from(steps)))(data.draw)

    def write(self, draw: Draw) -> None:
        """Reserves, writes, and seals (s), acknowledges (a) or does neither (x)."""
        keys, ttl_s, fate = draw(KEYS), draw(TTLS), draw(st.sampled_from("ssssssssssax"))
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
        assert all(b.digest == key[0] for key, b in blocks)
        bad = [key for key, b in blocks if self.slots[b.offset] == FLIPPED]
        assert all(self.slots[b.offset] == key for key, b in blocks if key not in bad)
        if bad:
            self.index.release("r", leased.lease_id)
            self.report(bad)
        elif leased.lease_id:
            self.leases[leased.lease_id] = {b.offset: key for key, b in blocks}

    def report(self, bad: list[bytes]) -> None:
        """A reader has found wrong bytes: no tier has them any more."""
        self.index.drop_corrupt(bad)
        self.lose_pins(bad)
        self.note("reported")
        assert not self.index.lookup("r", bad[:1], SIZE, ttl_s=1).lease_id
        for tier in self.index.lower.all:
            assert not any(tier.has(self.index._blocks.row_of(key)) for key in bad)

    def flip(self, draw: Draw) -> None:
        """A bit turns in a sealed block that nobody reads; copies may be made of it."""
        lent = {offset for lease in self.leases.values() for offset in lease}
        offset = draw(st.sampled_from(sorted(self.slots)))
        if offset not in lent and self.slots[offset] != b"half read":
            self.slots[offset] = FLIPPED

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
            below = self.pinned[pin_id] - sealed_keys(self.index)
            self.note("pinned")
            for name, keys_there in (("disk", set(self.files)), ("dram", self.in_host())):
                if below & keys_there:
                    self.note(f"pinned in {name}")

    def unpin(self, draw: Draw) -> None:
        pin_id = draw(st.sampled_from(sorted(self.pinned)))
        del self.pinned[pin_id]
        assert self.index.unpin("p", pin_id)

    def begin_demotion(self, draw: Draw) -> None:
        move = draw(st.sampled_from(self.index.lower.all)).next_demotion()
        self.remove_files()
        if move is None:
            return
        if move.tier is self.disk:
            assert move.header.key not in self.files, "a file is written twice"
        else:
            busy = [
                other.copy_offset
                for other in self.writes + self.reads
                if other.tier is not self.disk
            ]
            assert move.copy_offset not in busy, "a host slot in two hands"
            self.host[move.copy_offset] = b"half written"
        self.writes.append(move)

    def end_demotion(self, draw: Draw) -> None:
        move = self.writes.pop(draw(st.integers(0, len(self.writes) - 1)))
        is_written = draw(st.sampled_from([True, True, False]))
        self.note(f"demoted {move.tier.name} {is_written}")
        content = self.slots[move.offset]
        assert content in (move.header.key, FLIPPED), "a slot was reused while it was copied"
        if is_written and move.tier is self.disk:
            self.files[move.header.key] = content
        elif is_written:
            assert self.host[move.copy_offset] == b"half written", "a host slot in two hands"
            self.host[move.copy_offset] = content
        was_there = self.index.lookup("r", [move.header.key], SIZE, ttl_s=0).lease_id
        move.tier.demoted(move, is_written)
        if not was_there:
            self.note("dropped while it was copied")

    def begin_promotion(self, draw: Draw) -> None:
        """From all tiers, or with a disk that hangs."""
        keys = [*draw(st.permutations(self.known()))[:2], *draw(KEYS)]
        tiers = self.index.lower.all[: draw(st.sampled_from([2, 2, 2, 1]))]
        moves, awaited = promote(self.index.lower, keys, SIZE, tiers)
        assert {move.row for move in moves} <= set(awaited)
        for move in moves:
            assert move.tier in tiers
            assert self.copy_of(move) in (move.header.key, FLIPPED)
            self.slots[move.offset] = b"half read"
        self.reads += moves

    def end_promotion(self, draw: Draw) -> None:
        move = self.reads.pop(draw(st.integers(0, len(self.reads) - 1)))
        outcome = draw(st.sampled_from([Promoted.DONE, *Promoted]))
        if move.tier is self.disk and self.copy_of(move) == FLIPPED:
            outcome = Promoted.UNUSABLE  # its digest is verified
        self.note(f"{outcome.name} {move.tier.name}")
        assert self.slots[move.offset] == b"half read", "a slot was reused while it was read into"
        if outcome is Promoted.DONE:
            self.slots[move.offset] = self.copy_of(move)
            self.arrived.append(move)
        self.index.lower.promoted(move, outcome)
        if outcome is Promoted.UNUSABLE:
            self.lose_pins([move.header.key])

    def settle(self, draw: Draw) -> None:
        move = self.arrived.pop()
        content = self.slots[move.offset]
        assert content in (move.header.key, FLIPPED), "a held slot was reused"
        self.index.lower.settle(move)

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
        """A crash: what is on disk comes back whole, and nothing else."""
        self.note("restarted with files" if self.files else "restarted")
        self.remove_files()
        self.index = self.fresh_index(first_id=1000)
        keys = self.files
        self.index.lower.load([Header(key=k, num_bytes=SIZE, digest=k[0]) for k in keys])
        self.slots, self.host, self.leases, self.pinned = {}, {}, {}, {}
        self.writes, self.reads, self.arrived = [], [], []
        self.num_lives += 1
        self.follower.begin(self.index, str(self.num_lives))
        assert self.index.counts().num_on_disk == len(self.files)

    @invariant()
    def books_agree(self) -> None:
        self.remove_files()
        self.index.check()
        counts = self.index.counts()
        assert counts.num_on_disk == len(self.files) <= NUM_FILES
        assert counts.num_in_host <= NUM_HOST
        assert counts.num_promoting == len(self.reads)
        there = sealed_keys(self.index) | set(self.files) | self.in_host()
        assert self.follower.catch_up() == there, "a watcher knows other keys"
        assert set().union(*self.pinned.values()) <= there, "a pinned block was evicted"


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_the_machine_reaches_what_it_is_about() -> None:
    reached: Counter[str] = Counter()
    run_state_machine_as_test(
        type("Noting", (TierMachine,), {"reached": reached}),
        settings=settings(
            max_examples=300,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
        ),
    )
    assert set(reached) >= {
        "demoted dram True",
        "demoted dram False",
        "demoted disk True",
        "demoted disk False",
        "DONE dram",
        "DONE disk",
        "UNUSABLE dram",
        "UNUSABLE disk",
        "ABANDONED dram",
        "ABANDONED disk",
        "reported",
        "removed",
        "restarted with files",
        "evicted to disk",
        "dropped while it was copied",
        "pinned in disk",
        "pinned in dram",
    }, reached
