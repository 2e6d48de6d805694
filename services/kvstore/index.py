"""The books of the store: which block is where, who may write it, who reads it, when that ends.

Owns every state change of a block. Pure: no I/O, no tasks; time comes from the injected clock. Runs
on the event loop only. Nothing unsealed is handed to a reader; a slot has one owner at a time.

A reservation that expires leaves the index and its slot is quarantined: its writer may still write.
The slot is freed when the writer acknowledges, when its incarnation is disconnected, or after
`quarantine_s`, when the writer is presumed dead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from services.kvstore.arena import SlotAllocator
from services.kvstore.block import (
    Block,
    BlockState,
    IndexCounts,
    Lease,
    Leased,
    LeasedBlock,
    LeaseOutcome,
    Reserved,
    ReserveOutcome,
)
from services.kvstore.books import check_books
from services.kvstore.eviction import LruLeaves
from services.kvstore.expiry import Deadlines, Due


class BlockIndex:
    """Blocks by key, reservations, leases and quarantined slots over one slot allocator.

    Args: `clock` is monotonic, in seconds; `first_id` starts the ids, so that two lives of a store
    need not share any; `private_ttl_s` counts from Seal.
    """

    def __init__(
        self,
        slots: SlotAllocator,
        *,
        clock: Callable[[], float],
        private_ttl_s: float = 120.0,
        quarantine_s: float = 120.0,
        first_id: int = 1,
    ) -> None:
        self._slots = slots
        self._clock = clock
        self._private_ttl_s = private_ttl_s
        self._quarantine_s = quarantine_s
        self._ids = itertools.count(first_id)
        self._blocks: dict[bytes, Block] = {}  # RESERVED and SEALED
        self._reserved: dict[int, Block] = {}  # by reservation id
        self._sealed: dict[int, Block] = {}  # by the reservation id that sealed it
        self._quarantined: dict[int, Block] = {}
        self._dropped: set[Block] = set()  # leased still
        self._leases: dict[int, Lease] = {}
        self._num_private = 0
        self._deadlines = Deadlines()
        self._leaves = LruLeaves(self._blocks, slots)

    def reserve(
        self,
        owner: str,
        keys: Sequence[bytes],
        num_bytes: int,
        *,
        ttl_s: float,
        is_private: bool = False,
    ) -> list[Reserved]:
        """Slots for the new keys, parents first. After the first FULL no new key is tried."""
        self.expire()
        answers: list[Reserved] = []
        parent: bytes | None = None
        full = False
        for key in keys:
            block = self._blocks.get(key)
            if block is not None:
                answers.append(self._existing(block))
            elif full or (offset := self._leaves.make_room(num_bytes, self._drop)) is None:
                full = True
                answers.append(Reserved(outcome=ReserveOutcome.FULL))
            else:
                block = Block(
                    key=key,
                    offset=offset,
                    num_bytes=num_bytes,
                    owner=owner,
                    reservation_id=next(self._ids),
                    is_private=is_private,
                )
                answers.append(self._admit(block, None if is_private else parent, ttl_s))
            parent = key
        return answers

    def seal(
        self, owner: str, reservation_ids: Sequence[int], digests: Sequence[int]
    ) -> list[bool]:
        """Seals written blocks; False where expired, unknown or another's. May be repeated."""
        self.expire()
        pairs = zip(reservation_ids, digests, strict=True)
        return [self._seal(owner, number, digest) for number, digest in pairs]

    def acknowledge(self, owner: str, reservation_ids: Iterable[int]) -> int:
        """Frees slots, reserved or quarantined, that their writer will never touch again."""
        self.expire()
        num_freed = 0
        for number in reservation_ids:
            block = self._reserved.get(number) or self._quarantined.get(number)
            if block and block.owner == owner:
                self._free_unsealed(block)
                num_freed += 1
        return num_freed

    def lookup(self, owner: str, keys: Sequence[bytes], num_bytes: int, *, ttl_s: float) -> Leased:
        """Leases the longest sealed prefix of the keys and marks it as used."""
        self.expire()
        found: list[Block] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None or not block.is_readable_as(num_bytes):
                break
            found.append(block)
        if not found:
            return Leased(lease_id=0, blocks=())
        for block in reversed(found):  # a parent is more recent than its children
            block.num_leases += 1
            self._leaves.touch(block)
        lease_id = next(self._ids)
        self._leases[lease_id] = Lease(owner=owner, blocks=tuple(found))
        self._deadlines.set(Due.LEASE, lease_id, self._clock() + ttl_s)
        return Leased(lease_id=lease_id, blocks=tuple(map(LeasedBlock.of, found)))

    def release(self, owner: str, lease_id: int) -> LeaseOutcome:
        """Ends a lease and drops its private blocks; EXPIRED when ended, unknown or another's."""
        self.expire()
        lease = self._leases.get(lease_id)
        if lease and lease.owner == owner:
            self._end_lease(lease_id)
            return LeaseOutcome.HELD
        return LeaseOutcome.EXPIRED

    def drop_corrupt(self, keys: Iterable[bytes]) -> int:
        """Drops sealed blocks whose bytes a reader found wrong; returns how many."""
        return self._drop_sealed(keys, lambda block: True)

    def discard(self, keys: Iterable[bytes]) -> int:
        """Drops sealed private blocks that nobody will read; returns how many."""
        return self._drop_sealed(keys, lambda block: block.is_private)

    def evict(self, num_blocks: int) -> int:
        """Drops up to num_blocks by the eviction order; returns how many."""
        self.expire()
        for num_evicted in range(num_blocks):
            victim = self._leaves.peek()
            if victim is None:
                return num_evicted
            self._drop(victim)
        return num_blocks

    def disconnect(self, owner: str) -> None:
        """Frees everything of an incarnation that is known to be gone."""
        self.expire()
        for block in [*self._reserved.values(), *self._quarantined.values()]:
            if block.owner == owner:
                self._free_unsealed(block)
        for lease_id in [i for i, lease in self._leases.items() if lease.owner == owner]:
            self._end_lease(lease_id)

    def expire(self) -> None:
        """Ends what is past its deadline; every operation does this first."""
        now = self._clock()
        for kind, number in self._deadlines.pop_due(now):
            if kind is Due.RESERVATION:
                self._quarantine(self._reserved.pop(number), now)
            elif kind is Due.LEASE:
                self._end_lease(number)
            elif kind is Due.QUARANTINE:
                self._free_unsealed(self._quarantined[number])
            else:
                self._drop(self._sealed[number])

    def counts(self) -> IndexCounts:
        """Present numbers, without expiring anything."""
        return IndexCounts(
            num_sealed=len(self._sealed),
            num_reserved=len(self._reserved),
            num_private=self._num_private,
            num_quarantined=len(self._quarantined),
            num_dropped=len(self._dropped),
            num_leases=len(self._leases),
        )

    def check(self) -> None:
        """Asserts that every slot has one owner and that all books agree."""
        self._slots.check()
        self._leaves.check()
        check_books(
            blocks=self._blocks,
            reserved=self._reserved,
            sealed=self._sealed,
            quarantined=self._quarantined,
            dropped=self._dropped,
            leases=self._leases,
            deadlines=self._deadlines,
            used_offsets=self._slots.used_offsets,
        )
        assert self._num_private == sum(block.is_private for block in self._blocks.values())

    def _existing(self, block: Block) -> Reserved:
        if block.state is BlockState.RESERVED:
            return Reserved(outcome=ReserveOutcome.ALREADY_RESERVED)
        self._leaves.touch(block)
        return Reserved(outcome=ReserveOutcome.ALREADY_SEALED)

    def _admit(self, block: Block, parent: bytes | None, ttl_s: float) -> Reserved:
        self._leaves.add(block, parent)
        self._blocks[block.key] = block
        self._reserved[block.reservation_id] = block
        self._num_private += block.is_private
        self._deadlines.set(Due.RESERVATION, block.reservation_id, self._clock() + ttl_s)
        return Reserved(
            outcome=ReserveOutcome.RESERVED,
            reservation_id=block.reservation_id,
            offset=block.offset,
        )

    def _seal(self, owner: str, number: int, digest: int) -> bool:
        done = self._sealed.get(number)
        if done is not None:
            return done.owner == owner and done.digest == digest
        block = self._reserved.get(number)
        if block is None or block.owner != owner:
            return False
        del self._reserved[number]
        self._deadlines.cancel(Due.RESERVATION, number)
        block.state, block.digest = BlockState.SEALED, digest
        self._sealed[number] = block
        self._leaves.touch(block)
        if block.is_private:
            self._deadlines.set(Due.PRIVATE, number, self._clock() + self._private_ttl_s)
        return True

    def _unlist(self, block: Block) -> None:
        del self._blocks[block.key]
        self._num_private -= block.is_private
        self._leaves.remove(block)

    def _quarantine(self, block: Block, now: float) -> None:
        self._unlist(block)
        block.state = BlockState.QUARANTINED
        self._quarantined[block.reservation_id] = block
        self._deadlines.set(Due.QUARANTINE, block.reservation_id, now + self._quarantine_s)

    def _free_unsealed(self, block: Block) -> None:
        number = block.reservation_id
        if block.state is BlockState.RESERVED:
            del self._reserved[number]
            self._unlist(block)
        else:
            del self._quarantined[number]
        self._deadlines.cancel(Due.RESERVATION, number)
        self._deadlines.cancel(Due.QUARANTINE, number)
        self._slots.free(block.offset)

    def _drop(self, block: Block) -> None:
        del self._sealed[block.reservation_id]
        self._unlist(block)
        self._deadlines.cancel(Due.PRIVATE, block.reservation_id)
        block.state = BlockState.DROPPED
        if block.num_leases:
            self._dropped.add(block)
        else:
            self._slots.free(block.offset)

    def _drop_sealed(self, keys: Iterable[bytes], accept: Callable[[Block], bool]) -> int:
        self.expire()
        num_dropped = 0
        for key in keys:
            block = self._blocks.get(key)
            if block and block.state is BlockState.SEALED and accept(block):
                self._drop(block)
                num_dropped += 1
        return num_dropped

    def _end_lease(self, lease_id: int) -> None:
        lease = self._leases.pop(lease_id)
        self._deadlines.cancel(Due.LEASE, lease_id)
        for block in lease.blocks:
            block.num_leases -= 1
            if block.state is BlockState.SEALED and block.is_private:
                self._drop(block)
            elif block.state is BlockState.SEALED:
                self._leaves.offer(block)
            elif not block.num_leases:
                self._dropped.remove(block)
                self._slots.free(block.offset)
