"""A world around the real index, allocator and arena, in which writers and readers move real bytes.

It knows what was promised to whom and says when a promise is broken; it never repeats the index's
decisions (test_index_model.py does). Bytes may go wrong in two ways that a store cannot prevent: a
writer that outlives its quarantine, and a flipped bit. Such blocks are marked damaged, and the
digest alone must keep readers from using them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.kvstore.arena import DramArena, SlotAllocator
from services.kvstore.block import LeaseOutcome, ReserveOutcome
from services.kvstore.index import BlockIndex
from services.kvstore.tiers import Promoted
from tests.services.kvstore.store_below import Below, Copying
from tests.services.kvstore.store_ledger import (
    MAX_PINNED,
    NUM_CHANGES,
    NUM_HOST,
    NUM_PARTS,
    NUM_SLOTS,
    PRIVATE_TTL_S,
    QUARANTINE_S,
    SIZE,
    TENANT_NUM_BYTES,
    Life,
    Read,
    State,
    Write,
    digest_of,
)

AGES_S = 1000.0  # by then every deadline has passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How the store and its callers behave; each mutant changes one."""

    index_type: type[BlockIndex] = BlockIndex
    quarantine_s: float = QUARANTINE_S
    ids_per_life: int = 10_000
    confirms: bool = True  # readers use nothing that Release does not call held
    verifies: bool = True  # readers use nothing whose digest differs
    waits: bool = True  # writers acknowledge when the WRITE is over
    finishes: bool = True  # writers seal when all parts have arrived
    awaits: bool = True  # what is read back is given out when it has come
    pins: bool = False  # somebody pins, and a slow watcher follows: steps that hide other mutants


class World:
    """A clock, the lives of a store, and all reservations and leases that somebody remembers."""

    def __init__(self, habits: Habits) -> None:
        self.habits = habits
        self.now = 0.0
        self.writes: list[Write] = []
        self.reads: list[Read] = []
        self.reached: Counter[str] = Counter()
        self._num_lives = itertools.count()
        self.life = self.begin()

    def begin(self) -> Life:
        """A life of the store; ids and transfers of the former ones go on outside."""
        arena = DramArena(NUM_SLOTS * SIZE)
        slots = SlotAllocator(arena.num_bytes)
        number = next(self._num_lives)
        index = self.habits.index_type(
            slots,
            clock=lambda: self.now,
            private_ttl_s=PRIVATE_TTL_S,
            quarantine_s=self.habits.quarantine_s,
            first_id=1 + number * self.habits.ids_per_life,
            host_num_bytes=NUM_HOST * SIZE,
            tenant_num_bytes=TENANT_NUM_BYTES,
            pinned_share=MAX_PINNED,
            num_changes=NUM_CHANGES,
        )
        self.life = Life(name=f"life-{number}", index=index, slots=slots, arena=arena)
        self.below = Below(self.life)
        return self.life

    def reserve(
        self,
        owner: str,
        keys: Sequence[bytes],
        num_bytes: int,
        ttl_s: float,
        is_private: bool,
        tenant: str = "",
    ) -> list[Write]:
        """The new reservations; whoever had their bytes must not count on them any more."""
        answers = self.life.index.reserve(
            owner, keys, num_bytes, ttl_s=ttl_s, is_private=is_private, tenant=tenant
        )
        fresh: list[Write] = []
        for key, answer in zip(keys, answers, strict=True):
            if answer.outcome is ReserveOutcome.RESERVED:
                write = Write(
                    life=self.life,
                    owner=owner,
                    key=key,
                    offset=answer.offset,
                    num_bytes=num_bytes,
                    reservation_id=answer.reservation_id,
                    deadline=self.now + ttl_s,
                )
                self._grant(write)
                self.writes.append(write)
                fresh.append(write)
        return fresh

    def land(self, write: Write, num_parts: int) -> None:
        """Bytes arrive: in time, after the reservation, after the quarantine, after a restart."""
        if write.life is not self.life:
            self.reached["landed in an old life"] += 1
        elif write.is_owned(self.now):
            self.reached["landed in quarantine"] += self.now >= write.deadline
        elif write.state is State.OPEN:
            self._damage(write)
        for _ in range(min(num_parts, NUM_PARTS - write.num_landed)):
            part = write.part(write.num_landed)
            write.life.slot_of(write)[part] = np.frombuffer(write.content[part], np.uint8)
            write.num_landed += 1

    def seal(self, write: Write) -> None:
        """Live reservations are sealed and no others."""
        if write.num_landed < NUM_PARTS and self.habits.finishes:
            return
        is_current = write.life is self.life
        is_live = is_current and write.state is State.OPEN and self.now < write.deadline
        ids, digests = [write.reservation_id], [write.digest]
        (is_sealed,) = self.life.index.seal(write.owner, ids, digests)
        assert is_sealed or not is_live, "a live reservation was not sealed"
        if not is_sealed:
            self.reached["not sealed"] += 1
            return
        assert is_current, "an id of another life was sealed"
        assert is_live or write.state is State.SEALED, "a reservation that had ended was sealed"
        is_there = write in self.life.granted or self.below.has_returned(write)
        assert is_there, "a block was sealed in another's slot"
        write.state = State.SEALED

    def acknowledge(self, write: Write) -> None:
        """The WRITE is over, or failed half-way; its slot comes back if it was not sealed."""
        write.is_over = self.habits.waits
        is_current = write.life is self.life
        of_another = self.life.index.acknowledge("another", [write.reservation_id])
        assert not of_another, "another's slot was freed"
        num_freed = self.life.index.acknowledge(write.owner, [write.reservation_id])
        assert num_freed or not (is_current and write.is_owned(self.now)), "a slot was kept"
        if num_freed:
            assert is_current, "an id of another life was acknowledged"
            assert write.state is State.OPEN, "a sealed block was freed like a reservation"
            write.state = State.ENDED

    def look_up(
        self, owner: str, keys: Sequence[bytes], num_bytes: int, ttl_s: float
    ) -> list[Read]:
        """The lease of what is found, if any; each block must be the one sealed under its key."""
        leased = self.life.index.lookup(owner, keys, num_bytes, ttl_s=ttl_s)
        blocks: list[Write] = []
        for key, block in zip(keys, leased.blocks, strict=False):
            (write,) = (w for w in self.life.granted if w.offset == block.offset)
            assert write.state is State.SEALED and write.key == key, "not the block of this key"
            assert write.num_bytes == block.num_bytes == num_bytes
            assert write.digest == block.digest
            blocks.append(write)
        if not blocks:
            return []
        read = Read(
            life=self.life,
            owner=owner,
            lease_id=leased.lease_id,
            deadline=self.now + ttl_s,
            blocks=blocks,
            copies=[b""] * len(blocks),
        )
        self.reads.append(read)
        return [read]

    def read(self, read: Read, num_parts: int) -> None:
        """The next parts of all blocks of a lease, as the arena has them now."""
        for _ in range(min(num_parts, NUM_PARTS - read.num_copied)):
            for i, block in enumerate(read.blocks):
                slot = read.life.slot_of(block)
                read.copies[i] += slot[block.part(read.num_copied)].tobytes()
            read.num_copied += 1

    def release(self, read: Read) -> None:
        """Confirms the lease; what was read whole while it held is verified, and used if right."""
        was_live = self.is_live(read)
        self.reads.remove(read)
        outcome = self.life.index.release(read.owner, read.lease_id)
        is_held = outcome is LeaseOutcome.HELD
        assert is_held is was_live, f"Release said {outcome.name}; the lease was live: {was_live}"
        self.reached[outcome.name] += 1
        if read.num_copied < NUM_PARTS or not (is_held or not self.habits.confirms):
            return
        for block, copy in zip(read.blocks, read.copies, strict=True):
            is_right = copy == block.content
            assert is_right or block.is_damaged, "a confirmed read is not what was sealed"
            if self.habits.verifies and digest_of(copy) != block.digest:
                self.reached["found corrupt"] += 1
                self.drop_corrupt([block.key])
                continue
            assert is_right, "a reader used bytes that its key does not stand for"
            self.reached["used"] += 1

    def discard(self, keys: Sequence[bytes]) -> None:
        """Private blocks go; one that is still being written leaves its slot to its writer."""
        index = self.life.index
        index.discard(keys)
        for write in self.life.granted:
            if write.key in keys and write.reservation_id in index._reservations.quarantined:
                write.deadline = min(write.deadline, self.now)

    def drop_corrupt(self, keys: Sequence[bytes]) -> None:
        """Somebody found wrong bytes under these keys; nothing may bring them back."""
        self.life.index.drop_corrupt(keys)
        for key in keys:
            self.below.check_gone(key)

    def begin_promotion(self, keys: Sequence[bytes]) -> None:
        """The store takes slots for blocks that DRAM has."""
        for copying in self.below.begin_promotion(keys):
            self._grant(copying.write)

    def end_promotion(self, copying: Copying, outcome: Promoted) -> None:
        """A block has come back, or not."""
        self.below.end_promotion(copying, outcome, self.habits.awaits)
        self.reached[f"{outcome.name} damaged" if copying.write.is_damaged else outcome.name] += 1

    def flip(self, write: Write) -> None:
        """A bit turns."""
        self.life.slot_of(write)[0] ^= 1
        write.is_damaged = True

    def end_owner(self, owner: str, is_known: bool) -> None:
        """An owner is gone, its transfers too if that is known; nobody remembers its leases."""
        self.reads = [read for read in self.reads if read.owner != owner]
        if is_known:
            self.life.index.disconnect(owner)
            for write in [write for write in self.writes if write.owner == owner]:
                write.is_over = True
                write.state = State.ENDED if write.state is State.OPEN else write.state

    def is_live(self, read: Read) -> bool:
        """Whether a lease holds now."""
        return read.life is self.life and self.now < read.deadline

    def check(self) -> None:
        """Asserts that books balance and that what was written stays while anyone counts on it."""
        self.life.index.check()
        for write in self.life.granted:
            if write.is_damaged or not (write.state is State.SEALED or write.is_owned(self.now)):
                continue
            num_parts = NUM_PARTS if write.state is State.SEALED else write.num_landed
            end = write.num_bytes * num_parts // NUM_PARTS
            there = self.life.slot_of(write)[:end].tobytes()
            assert there == write.content[:end], "a slot was overwritten, or sealed unwritten"

    def quiesce(self) -> None:
        """Asserts that nothing is left when all has expired, but what eviction frees."""
        index = self.life.index
        self.below.finish()
        for _ in range(2):  # reservations, then their quarantine
            self.now += AGES_S
            index.expire()
        index.evict(NUM_SLOTS)
        index.check()
        assert not self.life.slots.used_offsets, f"slots leak: {index.counts()}"
        assert not index.counts().num_leases

    def _grant(self, write: Write) -> None:
        assert write.offset + write.num_bytes <= self.life.slots.num_bytes
        for other in [other for other in self.life.granted if other.overlaps(write)]:
            assert not other.is_owned(self.now), "a slot is in two hands: two writers'"
            leased = any(other in read.blocks for read in self.reads if self.is_live(read))
            assert not leased, "a slot is in two hands: a reader's and a writer's"
            self.life.granted.remove(other)
            self.reached["reused a slot"] += 1
        self.life.granted.append(write)

    def _damage(self, write: Write) -> None:
        """A writer that was given up for dead may hit whoever has its slot now."""
        for other in self.life.granted:
            if other is not write and other.overlaps(write):
                other.is_damaged = True
                self.reached["hit another's block"] += 1
