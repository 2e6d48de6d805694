"""What readers were promised: that the blocks of a lease stay where they are while it lives.

Owns leases; which blocks are found is decided here, how long a lease lives is the index's.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from services.kvstore.block import BlockState, Leased
from services.kvstore.blocks import Blocks
from services.kvstore.memory import MemoryTier
from services.kvstore.rows import RowArray, leading


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lease:
    """Blocks whose slots are not reused while it lives."""

    owner: str
    rows: RowArray
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Use:
    """Slots that a WRITE to a reader reads: not reused before it is over, lease or no lease."""

    rows: RowArray
    offsets: RowArray
    num_bytes: int


class Leases:
    """Leases by id, and uses that may outlive them."""

    def __init__(self, blocks: Blocks, memory: MemoryTier) -> None:
        self._blocks = blocks
        self._memory = memory
        self.live: dict[int, Lease] = {}
        self.uses: set[Use] = set()

    def sealed_prefix(self, keys: Sequence[bytes], num_bytes: int) -> RowArray:
        """The leading blocks of the keys that can be read in memory now."""
        blocks, rows = self._blocks, self._blocks.find(keys)
        is_readable = blocks.state.values.take(rows) == BlockState.SEALED
        is_readable &= blocks.num_bytes.values.take(rows) == num_bytes
        return leading(rows, is_readable)

    def begin(self, lease_id: int, owner: str, rows: RowArray, attempt: int) -> None:
        """Lends blocks out and marks them as used."""
        self._memory.hold(rows)
        self._blocks.touch_chain(rows)
        self.live[lease_id] = Lease(owner=owner, rows=rows, attempt=attempt)

    def leased(self, lease_id: int, rows: RowArray, num_bytes: int) -> Leased:
        """What a reader is told."""
        return Leased(
            lease_id=lease_id,
            num_bytes=num_bytes,
            offsets=self._blocks.offset.values.take(rows),
            digests=self._blocks.digest.values.take(rows),
        )

    def begin_use(self, lease_id: int, num_blocks: int) -> Use:
        """Holds the first blocks of a live lease once more, until `end_use`."""
        rows, blocks = self.live[lease_id].rows[:num_blocks], self._blocks
        self._memory.hold(rows)
        use = Use(
            rows=rows,
            offsets=blocks.offset.values.take(rows),
            num_bytes=blocks.num_bytes.at[rows[0]],
        )
        self.uses.add(use)
        return use

    def end_use(self, use: Use) -> None:
        """Takes that hold away."""
        self.uses.remove(use)
        self._memory.unhold(use.rows)

    def end(self, lease_id: int) -> list[int]:
        """Takes the hold away; returns rows of private blocks, which go with whoever read them."""
        rows = self.live.pop(lease_id).rows
        is_private = self._blocks.is_private.values.take(rows)
        self._memory.unhold(rows)
        return list(dict.fromkeys(rows[is_private].tolist()))

    def of_owner(self, owner: str) -> list[int]:
        """Ids of all leases of an owner."""
        return [lease_id for lease_id, lease in self.live.items() if lease.owner == owner]

    def of_attempts(self, owner: str, attempts: Set[int]) -> list[int]:
        """Ids of the leases that these Lookups got and that live."""
        leases = self.live.items()
        return [n for n, x in leases if x.owner == owner and x.attempt in attempts]
