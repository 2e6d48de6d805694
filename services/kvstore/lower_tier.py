"""One tier below the arena, as the books have it: which blocks have a copy there or get one.

Owns the tier's order of use and the copies being made; its budget is a Room's. Pure: another copies
the bytes and says how it went (carrier.py). While its copy is made, a block is held in memory.

Sealed blocks are copied in the order in which they were sealed, as fast as the tier takes them:
eviction from memory then finds a copy here and only forgets the slot. Private blocks are never
copied. Tiers know nothing of each other: each is a cache of its own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.kvstore.block import BlockState, CopyState, Place
from services.kvstore.blocks import Blocks
from services.kvstore.disk_format import Header
from services.kvstore.eviction import LruLeaves
from services.kvstore.memory import MemoryTier
from services.kvstore.room import Room
from services.kvstore.rows import NOBODY, RowArray

MAX_QUEUED = 16_384


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Move:
    """A copy to make between a slot of the arena and a tier; `header` says of which block.

    `offset` is the slot's, `copy_offset` the copy's where offsets tell.
    """

    row: int
    tier: LowerTier
    offset: int
    copy_offset: int
    header: Header


class LowerTier:
    """The books of one tier's copies. `name` is what metrics call it, `place` what watchers do."""

    def __init__(
        self, name: str, place: Place, blocks: Blocks, memory: MemoryTier, room: Room
    ) -> None:
        self.name = name
        self._blocks = blocks
        self._memory = memory
        self._room = room
        self.num_skipped = 0  # blocks that the queue had no room for
        self.num_evicted = 0  # copies that made room for others
        self.copies = blocks.copies(place)
        self.leaves = LruLeaves(blocks, self)
        self._queue: deque[int] = deque()  # sealed rows without a copy; some have gone since
        self._demotions: dict[int, Move] = {}

    def offer(self, row: int) -> None:
        """Queues a sealed block to be copied if it may be and is not."""
        blocks = self._blocks
        is_wanted = not blocks.is_private.at[row] and self._room.is_fit(blocks.num_bytes.at[row])
        if not is_wanted or self.copies.at[row] != CopyState.ABSENT:
            return
        if len(self._queue) < MAX_QUEUED:
            self._queue.append(row)
        else:
            self.num_skipped += 1

    def next_demotion(self) -> Move | None:
        """A block to copy now; its slot is held until `demoted`."""
        blocks = self._blocks
        while self._queue:
            row = self._queue.popleft()
            is_sealed = blocks.state.at[row] == BlockState.SEALED and not blocks.is_private.at[row]
            if not is_sealed or self.copies.at[row] != CopyState.ABSENT:
                continue
            if self._take_room(row):
                self.copies.at[row] = CopyState.WRITING
                self._memory.hold(np.array([row]))
                self._demotions[row] = self.move(row)
                return self._demotions[row]
        return None

    def demoted(self, move: Move, is_written: bool) -> None:
        """Ends a demotion. A copy of a block that was dropped meanwhile is removed."""
        row = move.row
        del self._demotions[row]
        self.copies.at[row] = CopyState.ABSENT
        if is_written and self._blocks.state.at[row] == BlockState.SEALED:
            self._enter(row)
        elif is_written:
            self._room.remove(row)
        else:
            self._room.cancel(row)
        self._memory.unhold(np.array([row]))

    def keep(self, row: int) -> bool:
        """Takes a copy that exists already into the books; False when there is no room for it."""
        if self._take_room(row):
            self._enter(row)
            return True
        return False

    def forget(self, row: int) -> None:
        """Drops a block's copy, if it has one; one still being made goes when it is."""
        if self.has(row):
            self.leaves.leave(row)
            self.copies.at[row] = CopyState.ABSENT
            self._room.remove(row)
            self._blocks.report(row)
            self._blocks.let_go(row)

    def has(self, row: int) -> bool:
        """Whether there is a whole copy of a block."""
        return self.copies.at[row] == CopyState.PRESENT

    def have(self, rows: RowArray) -> NDArray[np.bool_]:
        """The same for many."""
        return self.copies.values.take(rows) == CopyState.PRESENT

    def move(self, row: int) -> Move:
        """What is to be copied, for a block with a slot and a place here."""
        blocks = self._blocks
        header = Header(
            key=blocks.name_of(row),
            num_bytes=blocks.num_bytes.at[row],
            digest=blocks.digest.at[row],
        )
        return Move(
            row=row,
            tier=self,
            offset=blocks.offset.at[row],
            copy_offset=self._room.offset_of(row),
            header=header,
        )

    def take_removed(self) -> list[bytes]:
        """Keys whose copies are to be removed before any later demotion is written."""
        return self._room.take_removed()

    def is_free(self, row: int) -> bool:
        """Whether only children may keep a copy from eviction: it is not read, nor a pinned block's
        last place.
        """
        blocks, state = self._blocks, self._blocks.state.at[row]
        if not self.has(row) or state == BlockState.PROMOTING:
            return False
        is_last = state != BlockState.SEALED and blocks.num_copies(row) == 1
        return not (is_last and blocks.num_pins.at[row])

    def are_free(self, rows: RowArray) -> NDArray[np.bool_]:
        """The same for many."""
        blocks, state = self._blocks, self._blocks.state.values.take(rows)
        is_last = (state != BlockState.SEALED) & (blocks.nums_copies(rows) == 1)
        is_kept = is_last & (blocks.num_pins.values.take(rows) != 0)
        return self.have(rows) & (state != BlockState.PROMOTING) & ~is_kept

    @property
    def num_blocks(self) -> int:
        """Whole copies."""
        return int(np.count_nonzero(self.copies.values == CopyState.PRESENT))

    @property
    def num_bytes(self) -> int:
        """What copies take, those being made included."""
        return self._room.num_bytes

    @property
    def capacity_num_bytes(self) -> int:
        """What copies may take."""
        return self._room.capacity_num_bytes

    @property
    def num_pending(self) -> int:
        """Blocks that wait to be copied or are being copied; some that wait have gone."""
        return len(self._queue) + len(self._demotions)

    def held_rows(self) -> list[int]:
        """Rows that demotions hold."""
        return list(self._demotions)

    def check(self) -> None:
        """Asserts that copies, demotions and room agree with the rows."""
        stored = np.flatnonzero(self.copies.values == CopyState.PRESENT)
        writing = np.flatnonzero(self.copies.values == CopyState.WRITING)
        self.leaves.check(stored)
        self._room.check(np.concatenate([stored, writing]))
        assert set(writing.tolist()) == set(self._demotions), "a copy is written by nobody"
        for row, move in self._demotions.items():
            assert self._blocks.state.at[row] in (BlockState.SEALED, BlockState.DROPPED)
            assert move.copy_offset == self._room.offset_of(row), "a copy's place was changed"

    def _take_room(self, row: int) -> bool:
        """Removes the least recently used copies until a block's fits."""
        if not self._room.is_fit(self._blocks.num_bytes.at[row]):
            return False
        while not self._room.take(row):
            victim = self.leaves.peek()
            if victim == NOBODY:
                return False
            self.num_evicted += 1
            self.forget(victim)
        return True

    def _enter(self, row: int) -> None:
        self.copies.at[row] = CopyState.PRESENT
        self._blocks.report(row)
        self.leaves.enter(row)
