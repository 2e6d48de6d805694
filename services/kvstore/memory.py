"""Blocks in the arena: who has which slot, what holds it there, who goes when room is needed.

Owns every slot of a block with a key, and of dropped blocks until the last hold ends. Never touches
bytes, never knows what lies in lower tiers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.kvstore.arena import SlotAllocator
from services.kvstore.block import BlockState
from services.kvstore.blocks import Blocks
from services.kvstore.eviction import LruLeaves, TenantLeaves
from services.kvstore.rows import NOBODY, RowArray
from services.kvstore.tenants import Tenants

_ONE = np.int32(1)  # of the holds' own type: numpy is 40 times slower with another


class MemoryTier:
    """The tier that writers write into and readers read from."""

    def __init__(self, blocks: Blocks, slots: SlotAllocator, tenant_num_bytes: int = 0) -> None:
        self._blocks = blocks
        self._slots = slots
        self.tenants = Tenants(tenant_num_bytes)
        self.num_evicted = {"room": 0, "quota": 0}
        self._of_tenants = TenantLeaves(blocks, self) if tenant_num_bytes else None
        self.leaves = self._of_tenants or LruLeaves(blocks, self)

    @property
    def num_bytes(self) -> int:
        """Of the arena."""
        return self._slots.num_bytes

    def take(self, num_bytes: int, tenant: int) -> int | None:
        """Offset of a free slot, evicting as needed; evicts nothing where that would not help.

        A tenant that has all it may evicts its own blocks.
        """
        if self.tenants.is_over(tenant, num_bytes) and not self._make_room(tenant, num_bytes):
            return None
        is_worthwhile = False
        while (offset := self._slots.allocate(num_bytes)) is None:
            victim = self.leaves.peek()
            if victim == NOBODY:
                return None
            if not is_worthwhile and self._blocks.num_bytes.at[victim] != num_bytes:
                if not self._could_fit(num_bytes):
                    return None
                is_worthwhile = True
            self.num_evicted["room"] += 1
            self.evict(victim)
        return offset

    def place(self, row: int, offset: int, num_bytes: int, state: BlockState) -> None:
        """Puts a block that has no slot into one just taken."""
        blocks = self._blocks
        blocks.state.at[row], blocks.offset.at[row] = state, offset
        blocks.num_bytes.at[row] = num_bytes
        self.tenants.add(blocks.tenant.at[row], num_bytes)
        self.leaves.enter(row)

    def evict(self, row: int) -> None:
        """Takes a block that nothing holds out of memory and frees its slot."""
        self._slots.free(self.remove(row))

    def remove(self, row: int) -> int:
        """Takes a block that nothing holds out of memory; its slot is the caller's to free."""
        blocks = self._blocks
        self.leaves.leave(row)
        blocks.state.at[row] = BlockState.ABSENT
        blocks.is_private.at[row] = False
        self._discharge(row)
        blocks.report(row)
        blocks.let_go(row)
        return blocks.offset.at[row]

    def drop(self, row: int) -> None:
        """Takes a sealed block out of the index; its slot is freed when nothing holds it."""
        blocks = self._blocks
        if not blocks.num_holds.at[row]:
            self.evict(row)
            return
        self.leaves.leave(row)
        blocks.lose_name(row)
        blocks.is_private.at[row] = False
        blocks.state.at[row] = BlockState.DROPPED
        blocks.report(row)

    def hold(self, rows: RowArray) -> None:
        """Keeps slots from reuse; each hold ends with one `unhold`."""
        np.add.at(self._blocks.num_holds.values, rows, _ONE)

    def unhold(self, rows: RowArray) -> None:
        """Ends one hold of each; frees the slots of dropped blocks that nothing holds any more."""
        num_holds, state = self._blocks.num_holds.values, self._blocks.state.values
        np.subtract.at(num_holds, rows, _ONE)
        is_over = (num_holds.take(rows) == 0) & (state.take(rows) == BlockState.DROPPED)
        for row in set(rows[is_over].tolist()):
            self._free(row)
        self.leaves.offer_all(rows)

    def is_free(self, row: int) -> bool:
        """Whether only children may keep a block from eviction."""
        blocks = self._blocks
        is_sealed = blocks.state.at[row] == BlockState.SEALED
        is_kept = blocks.num_holds.at[row] or blocks.num_pins.at[row]
        return is_sealed and not blocks.is_private.at[row] and not is_kept

    def are_free(self, rows: RowArray) -> NDArray[np.bool_]:
        """The same for many."""
        blocks = self._blocks
        is_sealed = blocks.state.values.take(rows) == BlockState.SEALED
        return (
            is_sealed
            & ~blocks.is_private.values.take(rows)
            & (blocks.num_holds.values.take(rows) == 0)
            & (blocks.num_pins.values.take(rows) == 0)
        )

    def check(self) -> None:
        """Asserts that tenants' bytes are those of their blocks and within the limit."""
        blocks, tenants = self._blocks, self.tenants
        rows = np.flatnonzero(blocks.state.values != BlockState.ABSENT)
        numbers, at = np.unique(blocks.tenant.values[rows], return_inverse=True)
        sums = np.bincount(at, weights=blocks.num_bytes.values[rows], minlength=len(numbers))
        assert dict(zip(numbers.tolist(), sums.tolist(), strict=True)) == tenants.num_bytes
        assert not any(tenants.is_over(tenant, 0) for tenant in tenants.num_bytes), "over quota"

    def _make_room(self, tenant: int, num_bytes: int) -> bool:
        """Evicts a tenant's own blocks until it may have num_bytes more."""
        if num_bytes > self.tenants.limit or self._of_tenants is None:
            return False
        while self.tenants.is_over(tenant, num_bytes):
            victim = self._of_tenants.peek_of(tenant)
            if victim == NOBODY:
                return False
            self.num_evicted["quota"] += 1
            self.evict(victim)
        return True

    def _could_fit(self, num_bytes: int) -> bool:
        named = self._blocks.named()
        free = set(self._blocks.offset.values[named[self.are_free(named)]].tolist())
        return self._slots.could_fit(num_bytes, free.__contains__)

    def _free(self, row: int) -> None:
        self._discharge(row)
        self._slots.free(self._blocks.offset.at[row])
        self._blocks.free(row)

    def _discharge(self, row: int) -> None:
        """A block's bytes are not its tenant's any more."""
        tenant = self._blocks.tenant.at[row]
        self.tenants.remove(tenant, self._blocks.num_bytes.at[row])
        if self._of_tenants is not None and tenant not in self.tenants.num_bytes:
            self._of_tenants.forget(tenant)
