"""The books of the store: which block is where, who may write it, who reads it, when that ends.

Owns the deadlines of all promises and the order in which a block leaves its books; the books are
reservations.py (writers), leases.py (readers), pins.py, memory.py and tiers.py (places), journal.py
(what has changed). Pure: no I/O, no tasks; time comes from the injected clock. Runs on the event
loop only. Nothing unsealed is handed to a reader; a slot has one owner at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

from services.kvstore.arena import SlotAllocator
from services.kvstore.attempts import GivenUp
from services.kvstore.block import BlockState, IndexCounts, Leased, LeaseOutcome, Reserved
from services.kvstore.blocks import Blocks
from services.kvstore.books import check_books, count_books
from services.kvstore.expiry import Deadlines, Due
from services.kvstore.feed import Feed
from services.kvstore.journal import NUM_CHANGES
from services.kvstore.leases import Leases
from services.kvstore.memory import MemoryTier
from services.kvstore.pins import Pins
from services.kvstore.reservations import Reservations
from services.kvstore.rows import NOBODY
from services.kvstore.tenants import tenant_number
from services.kvstore.tiers import LowerTiers

DEFAULT_PINNED_SHARE = 0.5


class BlockIndex:
    """Blocks by key, with reservations and leases, over one slot allocator.

    Args: `clock` is monotonic, in seconds; `first_id` starts the ids, so that two lives of a store
    need not share any; `private_ttl_s` counts from Seal; 0 `host_num_bytes` or `disk_num_bytes` is
    no such tier, 0 `tenant_num_bytes` no limit; `pinned_share` of the arena bounds what is pinned;
    `num_changes` is how many the journal remembers.
    """

    def __init__(
        self,
        slots: SlotAllocator,
        *,
        clock: Callable[[], float],
        private_ttl_s: float = 120.0,
        quarantine_s: float = 120.0,
        first_id: int = 1,
        host_num_bytes: int = 0,
        disk_num_bytes: int = 0,
        tenant_num_bytes: int = 0,
        pinned_share: float = DEFAULT_PINNED_SHARE,
        num_changes: int = NUM_CHANGES,
    ) -> None:
        self._slots = slots
        self._clock = clock
        self._ids = itertools.count(first_id)
        self._deadlines, self._given_up = Deadlines(), GivenUp()
        self._blocks = Blocks(num_changes)
        self.journal = self._blocks.journal
        self._memory = MemoryTier(self._blocks, slots, tenant_num_bytes)
        self.lower = LowerTiers(
            self._blocks, self._memory, host_num_bytes=host_num_bytes, disk_num_bytes=disk_num_bytes
        )
        self.leases = Leases(self._blocks, self._memory)
        tiers = (self._memory.leaves, *(tier.leaves for tier in self.lower.all))
        self._pins = Pins(self._blocks, tiers, int(pinned_share * slots.num_bytes))
        self._reservations = Reservations(
            blocks=self._blocks,
            slots=slots,
            memory=self._memory,
            lower=self.lower,
            deadlines=self._deadlines,
            ids=self._ids,
            given_up=self._given_up,
            quarantine_s=quarantine_s,
            private_ttl_s=private_ttl_s,
            on_settled=lambda number: self.on_settled(number),
        )
        self.on_settled: Callable[[int], None] = lambda number: None

    def reserve(
        self,
        owner: str,
        keys: Sequence[bytes],
        num_bytes: int,
        *,
        ttl_s: float,
        is_private: bool = False,
        tenant: str = "",
        attempt: int = 0,
    ) -> list[Reserved]:
        """Slots for the new keys, parents first. After the first FULL no new key is tried."""
        self.expire()
        deadline, number = self._clock() + ttl_s, tenant_number(tenant)
        return self._reservations.reserve(
            owner, keys, num_bytes, deadline, is_private, number, attempt
        )

    def seal(
        self, owner: str, reservation_ids: Sequence[int], digests: Sequence[int]
    ) -> list[bool]:
        """Seals written blocks; False where expired, unknown or another's. May be repeated."""
        self.expire()
        now, seal = self._clock(), self._reservations.seal
        pairs = zip(reservation_ids, digests, strict=True)
        return [seal(owner, number, digest, now) for number, digest in pairs]

    def acknowledge(self, owner: str, reservation_ids: Iterable[int]) -> int:
        """Frees slots, reserved or quarantined, that their writer will never touch again."""
        self.expire()
        return self._reservations.acknowledge(owner, reservation_ids)

    def give_up(self, owner: str, attempts: Collection[int]) -> int:
        """Ends what these attempts got or would get yet, slots and leases; how many slots."""
        self.expire()
        named = set(attempts) - {0}  # which is no name
        self._given_up.add(owner, named, self._clock())
        for lease_id in self.leases.of_attempts(owner, named):
            self._end_lease(lease_id)
        return self._reservations.acknowledge(owner, self._reservations.of_attempts(owner, named))

    def lookup(
        self, owner: str, keys: Sequence[bytes], num_bytes: int, *, ttl_s: float, attempt: int = 0
    ) -> Leased:
        """Leases the longest sealed prefix of the keys in memory and marks it as used."""
        self.expire()
        wanted = () if self._given_up.has(owner, attempt) else keys
        rows = self.leases.sealed_prefix(wanted, num_bytes)
        lease_id = 0
        if len(rows):
            lease_id = next(self._ids)
            self.leases.begin(lease_id, owner, rows, attempt)
            self._deadlines.set(Due.LEASE, lease_id, self._clock() + ttl_s)
        return self.leases.leased(lease_id, rows, num_bytes)

    def first_reserved(self, keys: Sequence[bytes]) -> int:
        """The reservation of the first block of the keys that nobody can read yet; 0 for none."""
        self.expire()
        return self._reservations.first_live(self._blocks.find(keys))

    def release(self, owner: str, lease_id: int) -> LeaseOutcome:
        """Ends a lease and drops its private blocks; EXPIRED when ended, unknown or another's."""
        self.expire()
        lease = self.leases.live.get(lease_id)
        if lease and lease.owner == owner:
            self._end_lease(lease_id)
            return LeaseOutcome.HELD
        return LeaseOutcome.EXPIRED

    def pin(self, owner: str, keys: Sequence[bytes], *, ttl_s: float) -> tuple[int, int]:
        """Keeps the longest prefix that the store has from eviction: its length, and a pin's id.

        Shorter where as much is pinned as may be; the id is 0 where nothing is.
        """
        self.expire()
        rows = self._pins.prefix(keys)
        if not len(rows):
            return 0, 0
        pin_id = next(self._ids)
        self._pins.begin(pin_id, owner, rows)
        self._deadlines.set(Due.PIN, pin_id, self._clock() + ttl_s)
        return len(rows), pin_id

    def unpin(self, owner: str, pin_id: int) -> bool:
        """Ends a pin; False when ended, unknown or another's."""
        self.expire()
        pin = self._pins.live.get(pin_id)
        if pin is None or pin.owner != owner:
            return False
        self._end_pin(pin_id)
        return True

    def feed(self, from_sequence: int = 0) -> Feed:
        """For a watcher that knows all changes before from_sequence; 0: none."""
        return Feed(self._blocks, from_sequence)

    def drop_corrupt(self, keys: Iterable[bytes]) -> int:
        """Drops sealed blocks whose bytes a reader found wrong; returns how many.

        Copies below go even where the block has left the arena meanwhile: they may be of those
        bytes. One that is on its way back stays until its reader reports it.
        """
        keys = list(keys)
        num_dropped = self._drop_sealed(keys, only_private=False)
        return num_dropped + sum(map(self._forget_copies, keys))

    def discard(self, keys: Iterable[bytes]) -> int:
        """Drops private blocks that nobody will read; returns how many.

        One that is still being written leaves the index; its slot waits for its writer.
        """
        keys = list(keys)
        num_dropped = self._drop_sealed(keys, only_private=True)
        for key in keys:
            row = self._blocks.row_of(key)
            is_reserved = self._blocks.state.at[row] == BlockState.RESERVED
            if is_reserved and self._blocks.is_private.at[row]:
                number = self._blocks.reservation_id.at[row]
                self._deadlines.cancel(Due.RESERVATION, number)
                self._reservations.quarantine(number, self._clock())
                num_dropped += 1
        return num_dropped

    def evict(self, num_blocks: int) -> int:
        """Takes up to num_blocks out of memory by the eviction order; returns how many."""
        self.expire()
        for num_evicted in range(num_blocks):
            victim = self._memory.leaves.peek()
            if victim == NOBODY:
                return num_evicted
            self._memory.evict(victim)
        return num_blocks

    def disconnect(self, owner: str) -> None:
        """Frees everything of an incarnation that is known to be gone."""
        self.expire()
        for number in self._reservations.of_owner(owner):
            self._reservations.end(number)
        for lease_id in self.leases.of_owner(owner):
            self._end_lease(lease_id)
        for pin_id in self._pins.of_owner(owner):
            self._end_pin(pin_id)

    def expire(self) -> None:
        """Ends what is past its deadline; every operation does this first."""
        now = self._clock()
        self._given_up.expire(now)
        for kind, number in self._deadlines.pop_due(now):
            if kind is Due.RESERVATION:
                self._reservations.quarantine(number, now)
            elif kind is Due.LEASE:
                self._end_lease(number)
            elif kind is Due.PIN:
                self._pins.end(number)
            elif kind is Due.QUARANTINE:
                self._reservations.end(number)
            else:
                self._drop(self._reservations.row_of(number))

    def counts(self) -> IndexCounts:
        """Present numbers, without expiring anything."""
        return count_books(
            blocks=self._blocks,
            memory=self._memory,
            deadlines=self._deadlines,
            lower=self.lower,
            reservations=self._reservations,
            leases=self.leases,
            pins=self._pins,
        )

    def check(self) -> None:
        """Asserts that every slot has one owner and that all books agree."""
        self._slots.check()
        self._blocks.check()
        self.lower.check()
        check_books(
            blocks=self._blocks,
            memory=self._memory,
            reservations=self._reservations,
            leases=self.leases,
            pins=self._pins,
            moving=self.lower.held_rows(),
            deadlines=self._deadlines,
            used_offsets=self._slots.used_offsets,
        )

    def _drop(self, row: int) -> None:
        """Takes a sealed block out of every place and book."""
        self._deadlines.cancel(Due.PRIVATE, self._blocks.reservation_id.at[row])
        self.lower.forget(row)
        self._memory.drop(row)

    def _drop_sealed(self, keys: Iterable[bytes], *, only_private: bool) -> int:
        self.expire()
        num_dropped = 0
        for key in keys:
            row = self._blocks.row_of(key)
            is_sealed = self._blocks.state.at[row] == BlockState.SEALED
            if is_sealed and (self._blocks.is_private.at[row] or not only_private):
                self._drop(row)
                num_dropped += 1
        return num_dropped

    def _forget_copies(self, key: bytes) -> bool:
        row = self._blocks.row_of(key)
        is_on_its_way = self._blocks.state.at[row] == BlockState.PROMOTING
        return not is_on_its_way and self.lower.forget(row)

    def _end_lease(self, lease_id: int) -> None:
        self._deadlines.cancel(Due.LEASE, lease_id)
        for row in self.leases.end(lease_id):
            self._drop(row)

    def _end_pin(self, pin_id: int) -> None:
        self._deadlines.cancel(Due.PIN, pin_id)
        self._pins.end(pin_id)
