"""What writers were promised: slots to write into, and that nobody reuses one under their hands.

Owns reservations and quarantined slots. A reservation that expires leaves the index and its slot is
quarantined: its writer may still write. The slot is freed when the writer acknowledges, when its
incarnation is disconnected, or after `quarantine_s`, when the writer is presumed dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np

from services.kvstore.arena import SlotAllocator
from services.kvstore.attempts import GivenUp
from services.kvstore.block import BlockState, Reserved, ReserveOutcome
from services.kvstore.blocks import Blocks, Names
from services.kvstore.expiry import Deadlines, Due
from services.kvstore.memory import MemoryTier
from services.kvstore.rows import NOBODY, RowArray
from services.kvstore.tiers import LowerTiers

_ROW_BITS = 28  # of a reservation's id; the others count
_ROW_MASK = 2**_ROW_BITS - 1
_FULL = Reserved(outcome=ReserveOutcome.FULL)
_ALREADY_RESERVED = Reserved(outcome=ReserveOutcome.ALREADY_RESERVED)
_ALREADY_SEALED = Reserved(outcome=ReserveOutcome.ALREADY_SEALED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A reservation: the row is its own until it expires, the slot until it ends."""

    owner: str
    row: int
    offset: int
    attempt: int


class Reservations:
    """Reservations by id. An id names its row, so that a sealed block needs no book of its own."""

    def __init__(
        self,
        *,
        blocks: Blocks,
        slots: SlotAllocator,
        memory: MemoryTier,
        lower: LowerTiers,
        deadlines: Deadlines,
        ids: Iterator[int],
        given_up: GivenUp,
        quarantine_s: float,
        private_ttl_s: float,
        on_settled: Callable[[int], None],
    ) -> None:
        self._blocks = blocks
        self._slots = slots
        self._memory = memory
        self._lower = lower
        self._deadlines = deadlines
        self._ids = ids
        self._given_up = given_up
        self._quarantine_s = quarantine_s
        self._private_ttl_s = private_ttl_s
        self._on_settled = on_settled  # with an id that is not live any more
        self._owners = Names()
        self.live: dict[int, Claim] = {}
        self.quarantined: dict[int, Claim] = {}

    def reserve(
        self,
        owner: str,
        keys: Sequence[bytes],
        num_bytes: int,
        deadline: float,
        is_private: bool,
        tenant: int,
        attempt: int,
    ) -> list[Reserved]:
        """Slots for the new keys, parents first. After the first FULL no new key is tried.

        An attempt that was given up is told FULL.
        """
        answers: list[Reserved] = []
        parent = NOBODY  # a private block has none
        full = self._given_up.has(owner, attempt)
        for key in keys:
            row = self._blocks.row_of(key)
            if self._blocks.state.at[row] != BlockState.ABSENT or self._blocks.num_pins.at[row]:
                answers.append(self._existing(row))
            elif full or (offset := self._memory.take(num_bytes, tenant)) is None:
                full = True
                answers.append(_FULL)
            else:
                self._lower.forget_other(row, num_bytes)
                row = self._blocks.open(key, parent)  # taking may have evicted either
                self._blocks.is_private.at[row] = is_private
                self._blocks.tenant.at[row] = tenant
                self._blocks.touch(row)
                self._memory.place(row, offset, num_bytes, BlockState.RESERVED)
                answers.append(self._claim(owner, row, offset, deadline, attempt))
            parent = NOBODY if is_private else row
        return answers

    def seal(self, owner: str, number: int, digest: int, now: float) -> bool:
        """Seals a written block; False where the id is unknown, ended or another's."""
        blocks = self._blocks
        claim = self.live.get(number)
        if claim is None:
            return self._was_sealed(owner, number, digest)
        if claim.owner != owner:
            return False
        row = claim.row
        del self.live[number]
        self._deadlines.cancel(Due.RESERVATION, number)
        blocks.state.at[row] = BlockState.SEALED
        self._lower.on_sealed(row, digest)
        blocks.digest.at[row], blocks.reservation_id.at[row] = digest, number
        blocks.owner.at[row] = self._owners.number(owner)
        blocks.touch(row)
        blocks.report(row)
        self._memory.leaves.offer(row)
        if blocks.is_private.at[row]:
            self._deadlines.set(Due.PRIVATE, number, now + self._private_ttl_s)
        self._on_settled(number)
        return True

    def acknowledge(self, owner: str, numbers: Iterable[int]) -> int:
        """Frees slots, reserved or quarantined, of an owner; returns how many."""
        num_freed = 0
        for number in numbers:
            claim = self.live.get(number) or self.quarantined.get(number)
            if claim and claim.owner == owner:
                self.end(number)
                num_freed += 1
        return num_freed

    def of_attempts(self, owner: str, attempts: Set[int]) -> list[int]:
        """Ids of what these Reserves got and nobody has given back."""
        claims = {**self.live, **self.quarantined}
        return [n for n, c in claims.items() if c.owner == owner and c.attempt in attempts]

    def first_live(self, rows: RowArray) -> int:
        """The reservation of the first row without bytes to read, in any tier; 0: none."""
        blocks = self._blocks
        state = blocks.state.values.take(rows)
        is_present = (state == BlockState.SEALED) | (state == BlockState.PROMOTING)
        # While a block is written anew, nobody reads the copies that it may have below.
        is_present |= (state == BlockState.ABSENT) & (blocks.nums_copies(rows) != 0)
        if is_present.all():
            return 0
        row = int(rows[np.argmin(is_present)])
        is_reserved = blocks.state.at[row] == BlockState.RESERVED
        return blocks.reservation_id.at[row] if is_reserved else 0

    def of_owner(self, owner: str) -> list[int]:
        """Ids of everything that an owner has not given back."""
        claims = {**self.live, **self.quarantined}
        return [number for number, claim in claims.items() if claim.owner == owner]

    def quarantine(self, number: int, now: float) -> None:
        """A reservation has expired: its block leaves the index, its slot is not reused yet."""
        claim = self.quarantined[number] = self.live.pop(number)
        self._memory.remove(claim.row)
        self._deadlines.set(Due.QUARANTINE, number, now + self._quarantine_s)
        self._on_settled(number)

    def end(self, number: int) -> None:
        """Frees the slot of a reservation, live or quarantined."""
        claim = self.live.pop(number, None)
        if claim is not None:
            self._memory.remove(claim.row)
        else:
            claim = self.quarantined.pop(number)
        self._deadlines.cancel(Due.RESERVATION, number)
        self._deadlines.cancel(Due.QUARANTINE, number)
        self._slots.free(claim.offset)
        self._on_settled(number)

    def row_of(self, number: int) -> int:
        """The row that a reservation's id names; another block's by now, perhaps."""
        return number & _ROW_MASK

    def _existing(self, row: int) -> Reserved:
        is_sealed = self._blocks.state.at[row] == BlockState.SEALED
        if not is_sealed and not self._blocks.num_pins.at[row]:
            return _ALREADY_RESERVED
        self._blocks.touch(row)
        return _ALREADY_SEALED

    def _claim(self, owner: str, row: int, offset: int, deadline: float, attempt: int) -> Reserved:
        number = next(self._ids) << _ROW_BITS | row
        self.live[number] = Claim(owner=owner, row=row, offset=offset, attempt=attempt)
        self._blocks.reservation_id.at[row] = number
        self._deadlines.set(Due.RESERVATION, number, deadline)
        return Reserved(outcome=ReserveOutcome.RESERVED, reservation_id=number, offset=offset)

    def _was_sealed(self, owner: str, number: int, digest: int) -> bool:
        """Whether this very reservation was sealed so, and the block is still there."""
        blocks, row = self._blocks, self.row_of(number)
        if row >= len(blocks.state.at) or blocks.reservation_id.at[row] != number:
            return False
        is_sealed = blocks.state.at[row] == BlockState.SEALED
        is_owner = blocks.owner.at[row] == self._owners.number(owner)
        return is_sealed and is_owner and blocks.digest.at[row] == digest
