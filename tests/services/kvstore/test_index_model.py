"""The index against a naive model, in random order: every slot, lease and eviction agrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.kvstore.arena import SlotAllocator
from services.kvstore.block import BlockState, LeaseOutcome, ReserveOutcome
from services.kvstore.index import BlockIndex

SIZE, NUM_SLOTS = 4096, 5
PRIVATE_TTL_S, QUARANTINE_S = 20.0, 30.0

KEYS = st.lists(st.sampled_from([bytes([65 + i]) for i in range(7)]), min_size=1, max_size=4)
OWNERS = st.sampled_from(["left", "right"])
TTLS = st.sampled_from([1.0, 4.0, 15.0])


@dataclass(eq=False)
class Held:
    """A slot as the model sees it."""

    key: bytes
    offset: int
    number: int
    owner: str
    deadline: float
    is_private: bool
    parent: bytes | None
    state: str = "reserved"
    digest: int = 0


class Model:
    """What the index must do, written without any cleverness."""

    def __init__(self) -> None:
        self.now = 0.0
        self.held: list[Held] = []  # order of use, latest last; every owned slot
        self.leases: dict[int, tuple[str, float, list[Held]]] = {}

    def present(self, key: bytes) -> Held | None:
        """The block of a key that is reserved or sealed."""
        for held in self.held:
            if held.key == key and held.state in ("reserved", "sealed"):
                return held
        return None

    def by_number(self, number: int) -> Held | None:
        """The slot of a reservation id, while it is owned."""
        return next((held for held in self.held if held.number == number), None)

    def is_leased(self, held: Held) -> bool:
        """Whether a live lease reads the slot."""
        return any(held in blocks for _, _, blocks in self.leases.values())

    def has_children(self, key: bytes) -> bool:
        """Whether a present block has the key as parent."""
        present = ("reserved", "sealed")
        return any(held.parent == key and held.state in present for held in self.held)

    def touch(self, held: Held) -> None:
        """Makes it the most recently used."""
        self.held.remove(held)
        self.held.append(held)

    def victim(self) -> Held | None:
        """The block that eviction must choose."""
        for held in self.held:
            if held.state != "sealed" or held.is_private:
                continue
            if not self.is_leased(held) and not self.has_children(held.key):
                return held
        return None

    def drop(self, held: Held) -> None:
        """Takes a sealed block out; its slot stays while leased."""
        if self.is_leased(held):
            held.state = "dropped"
        else:
            self.held.remove(held)

    def end_lease(self, lease_id: int) -> None:
        """Ends a lease and what hung on it."""
        _, _, blocks = self.leases.pop(lease_id)
        for held in dict.fromkeys(blocks):
            if held.state == "sealed" and held.is_private:
                held.state = "dropped"
            if held.state == "dropped" and not self.is_leased(held):
                self.held.remove(held)

    def expire(self) -> None:
        """Ends what is past its deadline."""
        for held in list(self.held):
            if held.deadline > self.now:
                continue
            if held.state == "reserved":
                held.state, held.deadline = "quarantined", self.now + QUARANTINE_S
            elif held.state == "quarantined":
                self.held.remove(held)
            elif held.state == "sealed":
                self.drop(held)
        for lease_id, (_, deadline, _) in list(self.leases.items()):
            if deadline <= self.now:
                self.end_lease(lease_id)

    def free_unsealed(self, accept: Callable[[Held], bool]) -> int:
        """Frees reserved and quarantined slots; returns how many."""
        gone = [h for h in self.held if h.state in ("reserved", "quarantined") and accept(h)]
        for held in gone:
            self.held.remove(held)
        return len(gone)

    def count(self, state: str) -> int:
        """Slots in a state."""
        return sum(held.state == state for held in self.held)


class IndexMachine(RuleBasedStateMachine):
    """Does the same to both and compares every answer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        slots = SlotAllocator(NUM_SLOTS * SIZE)
        self.index = BlockIndex(
            slots,
            clock=lambda: self.model.now,
            private_ttl_s=PRIVATE_TTL_S,
            quarantine_s=QUARANTINE_S,
        )
        self.numbers = [999]
        self.lease_ids = [0, 998]

    @rule(keys=KEYS, owner=OWNERS, ttl_s=TTLS, is_private=st.booleans())
    def reserve(self, keys: list[bytes], owner: str, ttl_s: float, is_private: bool) -> None:
        model = self.model
        answers = self.index.reserve(owner, keys, SIZE, ttl_s=ttl_s, is_private=is_private)
        parent, full = None, False
        for key, answer in zip(keys, answers, strict=True):
            held = model.present(key)
            if held is not None:
                assert answer.outcome.name == f"ALREADY_{held.state.upper()}"
                if held.state == "sealed":
                    model.touch(held)
            elif full or not self._make_room():
                full = True
                assert answer.outcome is ReserveOutcome.FULL
            else:
                assert answer.outcome is ReserveOutcome.RESERVED
                assert answer.offset not in {h.offset for h in model.held}, "slot owned twice"
                assert answer.offset % SIZE == 0 and answer.offset < NUM_SLOTS * SIZE
                linked = parent if parent and model.present(parent) else None
                if is_private or model.has_children(key):
                    linked = None
                number, deadline = answer.reservation_id, model.now + ttl_s
                fresh = Held(key, answer.offset, number, owner, deadline, is_private, linked)
                model.held.append(fresh)
                self.numbers.append(number)
            parent = key

    @rule(data=st.data(), owner=OWNERS, digest=st.integers(0, 2))
    def seal(self, data: st.DataObject, owner: str, digest: int) -> None:
        self._seal(owner, data.draw(st.sampled_from(self.numbers[-8:])), digest)

    @rule(digest=st.integers(0, 2))
    def seal_all(self, digest: int) -> None:
        for held in [held for held in self.model.held if held.state == "reserved"]:
            self._seal(held.owner, held.number, digest)

    @rule(data=st.data(), owner=OWNERS)
    def acknowledge(self, data: st.DataObject, owner: str) -> None:
        number = data.draw(st.sampled_from(self.numbers[-8:]))
        freed = self.model.free_unsealed(lambda h: h.number == number and h.owner == owner)
        assert self.index.acknowledge(owner, [number]) == freed

    @rule(keys=KEYS, owner=OWNERS, ttl_s=TTLS)
    def lookup(self, keys: list[bytes], owner: str, ttl_s: float) -> None:
        self._lookup(keys, owner, ttl_s)

    @rule(data=st.data(), owner=OWNERS, ttl_s=TTLS)
    def lookup_sealed(self, data: st.DataObject, owner: str, ttl_s: float) -> None:
        sealed = [held.key for held in self.model.held if held.state == "sealed"]
        if sealed:
            keys = st.lists(st.sampled_from(sealed), min_size=1, max_size=3)
            self._lookup(data.draw(keys), owner, ttl_s)

    @rule(data=st.data(), owner=OWNERS)
    def release(self, data: st.DataObject, owner: str) -> None:
        lease_id = data.draw(st.sampled_from(self.lease_ids[-5:]))
        is_held = lease_id in self.model.leases and self.model.leases[lease_id][0] == owner
        outcome = self.index.release(owner, lease_id)
        assert outcome is (LeaseOutcome.HELD if is_held else LeaseOutcome.EXPIRED)
        if is_held:
            self.model.end_lease(lease_id)

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0, 20.0, 40.0]))
    def advance(self, seconds: float) -> None:
        self.model.now += seconds
        self.model.expire()
        self.index.expire()

    @rule(num_blocks=st.integers(1, 3))
    def evict(self, num_blocks: int) -> None:
        num_evicted = 0
        while num_evicted < num_blocks and (victim := self.model.victim()):
            self.model.drop(victim)
            num_evicted += 1
        assert self.index.evict(num_blocks) == num_evicted

    @rule(keys=KEYS, only_private=st.booleans())
    def drop_or_discard(self, keys: list[bytes], only_private: bool) -> None:
        num_dropped = 0
        for key in keys:
            held = self.model.present(key)
            if held and held.state == "sealed" and (held.is_private or not only_private):
                self.model.drop(held)
                num_dropped += 1
            elif held and held.state == "reserved" and held.is_private and only_private:
                held.state, held.deadline = "quarantined", self.model.now + QUARANTINE_S
                num_dropped += 1
        drop = self.index.discard if only_private else self.index.drop_corrupt
        assert drop(keys) == num_dropped

    @rule(owner=OWNERS)
    def disconnect(self, owner: str) -> None:
        self.model.free_unsealed(lambda held: held.owner == owner)
        for lease_id in [i for i, lease in self.model.leases.items() if lease[0] == owner]:
            self.model.end_lease(lease_id)
        self.index.disconnect(owner)

    @invariant()
    def books_agree(self) -> None:
        self.index.check()
        counts, model = self.index.counts(), self.model
        blocks = self.index._blocks
        assert {
            (blocks.name_of(row)[:1], blocks.offset.at[row], BlockState(blocks.state.at[row]))
            for row in blocks.named().tolist()
            if blocks.state.at[row]
        } == {
            (h.key, h.offset, BlockState[h.state.upper()])
            for h in model.held
            if h.state in ("reserved", "sealed")
        }
        assert counts.num_reserved == model.count("reserved")
        assert counts.num_sealed == model.count("sealed")
        assert counts.num_quarantined == model.count("quarantined")
        assert counts.num_dropped == model.count("dropped")
        assert counts.num_leases == len(model.leases)

    def _seal(self, owner: str, number: int, digest: int) -> None:
        held = self.model.by_number(number)
        expected = False
        if held is not None and held.owner == owner and held.state == "reserved":
            expected = True
            held.state, held.digest = "sealed", digest
            expiry = self.model.now + PRIVATE_TTL_S
            held.deadline = expiry if held.is_private else float("inf")
            self.model.touch(held)
        elif held is not None and held.owner == owner and held.state == "sealed":
            expected = held.digest == digest
        assert self.index.seal(owner, [number], [digest]) == [expected]

    def _lookup(self, keys: list[bytes], owner: str, ttl_s: float) -> None:
        leased = self.index.lookup(owner, keys, SIZE, ttl_s=ttl_s)
        found: list[Held] = []
        for key in keys:
            held = self.model.present(key)
            if held is None or held.state != "sealed":
                break
            found.append(held)
        assert [(b.offset, b.digest) for b in leased.blocks] == [
            (h.offset, h.digest) for h in found
        ]
        assert (leased.lease_id != 0) is bool(found)
        if found:
            for held in reversed(found):
                self.model.touch(held)
            self.model.leases[leased.lease_id] = (owner, self.model.now + ttl_s, found)
            self.lease_ids.append(leased.lease_id)

    def _make_room(self) -> bool:
        if len(self.model.held) < NUM_SLOTS:
            return True
        victim = self.model.victim()
        if victim is None:
            return False
        self.model.held.remove(victim)
        return True


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
