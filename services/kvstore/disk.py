"""Blocks on disk, as the books have them: which have a copy, which one is being made or read back.

Owns the disk's byte budget, its order of use, and the moves under way. Pure: another copies the
bytes and says how it went (mover.py). A block being moved belongs to its move: while its copy is
written it is held in memory, while it is read back nobody but the move has its slot.

Sealed blocks are copied to disk in the order in which they were sealed, as fast as the disk takes
them: eviction then finds a copy there and only forgets the slot. Private blocks are never copied.
Keys are hash chains from the model's fingerprint, so that what another model left on the disk is
never asked for; it is the least recently used and goes first.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.kvstore.block import BlockState, DiskState
from services.kvstore.blocks import Blocks
from services.kvstore.disk_format import DIGEST_UNIT, Header, file_num_bytes
from services.kvstore.eviction import LruLeaves
from services.kvstore.memory import MemoryTier
from services.kvstore.rows import NOBODY, RowArray, leading

MAX_QUEUED = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A copy to make between a slot and a file; `offset` is the slot's."""

    row: int
    offset: int
    header: Header


class Promoted(enum.Enum):
    """How a read from disk ended."""

    DONE = enum.auto()  # the slot has the bytes that were sealed
    UNUSABLE = enum.auto()  # the disk does not have them
    ABANDONED = enum.auto()  # nothing was read


class DiskTier:
    """The books of one directory of at most num_bytes; 0 stands for no disk at all."""

    def __init__(self, blocks: Blocks, memory: MemoryTier, num_bytes: int) -> None:
        self._blocks = blocks
        self._memory = memory
        self.capacity_num_bytes = num_bytes
        self.num_bytes = 0
        self.num_skipped = 0  # blocks that the queue had no room for
        self.leaves = LruLeaves(blocks, self)
        self._queue: deque[int] = deque()  # sealed rows without a copy; some have gone since
        self._demotions: dict[int, Move] = {}
        self._promotions: dict[int, Move] = {}
        self._arrived: set[int] = set()  # promoted, held until everyone who asked has a lease
        self._removed: list[bytes] = []

    def load(self, headers: Iterable[Header]) -> None:
        """Takes what a former life left on disk, least recently used first."""
        for header in headers:
            if self._make_room(file_num_bytes(header.num_bytes)):
                row = self._blocks.open(header.key, NOBODY)
                self._blocks.num_bytes.at[row] = header.num_bytes
                self._blocks.digest.at[row] = header.digest
                self._blocks.touch(row)
                self._enter(row)
            else:
                self._removed.append(header.key)

    def forget_other(self, row: int, num_bytes: int) -> None:
        """Drops the copy of a block that is about to be written anew, in another size."""
        if self._blocks.num_bytes.at[row] != num_bytes:
            self.forget(row)

    def on_sealed(self, row: int, digest: int) -> None:
        """A block that is sealed now is about to get its digest; queues it to be copied."""
        blocks = self._blocks
        if blocks.digest.at[row] != digest:
            self.forget(row)
        num_bytes = blocks.num_bytes.at[row]
        is_fit = (
            not num_bytes % DIGEST_UNIT and file_num_bytes(num_bytes) <= self.capacity_num_bytes
        )
        if blocks.is_private.at[row] or not is_fit or blocks.disk.at[row] != DiskState.ABSENT:
            return
        if len(self._queue) < MAX_QUEUED:
            self._queue.append(row)
        else:
            self.num_skipped += 1

    def next_demotion(self) -> Move | None:
        """A block to write out now; its slot is held until `demoted`."""
        blocks = self._blocks
        while self._queue:
            row = self._queue.popleft()
            is_sealed = blocks.state.at[row] == BlockState.SEALED and not blocks.is_private.at[row]
            if not is_sealed or blocks.disk.at[row] != DiskState.ABSENT:
                continue
            num_bytes = file_num_bytes(blocks.num_bytes.at[row])
            if self._make_room(num_bytes):
                blocks.disk.at[row] = DiskState.WRITING
                self.num_bytes += num_bytes
                self._memory.hold(np.array([row]))
                self._demotions[row] = self._move(row)
                return self._demotions[row]
        return None

    def demoted(self, move: Move, is_written: bool) -> None:
        """Ends a demotion. A copy of a block that was dropped meanwhile is removed."""
        row = move.row
        del self._demotions[row]
        self._blocks.disk.at[row] = DiskState.ABSENT
        self.num_bytes -= file_num_bytes(move.header.num_bytes)
        if is_written and self._blocks.state.at[row] == BlockState.SEALED:
            self._enter(row)
        elif is_written:
            self._removed.append(move.header.key)
        self._memory.unhold(np.array([row]))

    def promote(self, keys: Sequence[bytes], num_bytes: int) -> tuple[list[Move], list[int]]:
        """Takes slots for what is on disk only of the longest prefix that the store has.

        Returns the reads to start, and the rows of all reads under way that the prefix waits for.
        """
        blocks = self._blocks
        rows = self._known_prefix(keys, num_bytes)
        if (blocks.state.values.take(rows) == BlockState.SEALED).all():
            return [], []
        blocks.touch_chain(rows)
        moves: list[Move] = []
        awaited: list[int] = []
        limit = self._memory.num_bytes // 2  # blocks that are being read are in nobody's use
        for row in rows.tolist():
            is_on_disk = blocks.disk.at[row] == DiskState.PRESENT
            if is_on_disk and blocks.state.at[row] == BlockState.ABSENT:
                is_room = (len(self._promotions) + 1) * num_bytes <= limit
                tenant = blocks.tenant.at[row]
                offset = self._memory.take(num_bytes, tenant) if is_room else None
                if offset is None:
                    break
                self._memory.place(row, offset, num_bytes, BlockState.PROMOTING)
                self._promotions[row] = self._move(row)
                moves.append(self._promotions[row])
            if blocks.state.at[row] == BlockState.PROMOTING:
                awaited.append(row)
            elif blocks.state.at[row] != BlockState.SEALED:
                break  # evicted a moment ago, to make room for the blocks before it
        return moves, awaited

    def promoted(self, move: Move, outcome: Promoted) -> None:
        """Ends a read. A block that is DONE is sealed, and held until it is settled."""
        row = move.row
        del self._promotions[row]
        if outcome is Promoted.DONE:
            self._blocks.state.at[row] = BlockState.SEALED
            self._blocks.report(row)
            self._memory.hold(np.array([row]))
            self._arrived.add(row)
        else:
            self._memory.evict(row)
        if outcome is Promoted.UNUSABLE:
            self.forget(row)
        self.leaves.offer(row)

    def settle(self, move: Move) -> None:
        """Ends the hold on a promoted block."""
        self._arrived.remove(move.row)
        self._memory.unhold(np.array([move.row]))

    def forget(self, row: int) -> None:
        """Drops a block's copy, if it has one; one still being written goes when it is."""
        if self._blocks.disk.at[row] == DiskState.PRESENT:
            self.leaves.leave(row)
            self._blocks.disk.at[row] = DiskState.ABSENT
            self.num_bytes -= file_num_bytes(self._blocks.num_bytes.at[row])
            self._removed.append(self._blocks.name_of(row))
            self._blocks.report(row)
            self._blocks.let_go(row)

    def take_removed(self) -> list[bytes]:
        """Keys whose files are to be removed before any later demotion is written."""
        removed, self._removed = self._removed, []
        return removed

    def is_free(self, row: int) -> bool:
        """Whether only children may keep a copy from eviction."""
        is_present = self._blocks.disk.at[row] == DiskState.PRESENT
        state = self._blocks.state.at[row]
        is_kept = state == BlockState.PROMOTING or (
            self._blocks.num_pins.at[row] and state != BlockState.SEALED
        )
        return is_present and not is_kept

    def are_free(self, rows: RowArray) -> NDArray[np.bool_]:
        """The same for many."""
        is_present = self._blocks.disk.values.take(rows) == DiskState.PRESENT
        state = self._blocks.state.values.take(rows)
        is_pinned = self._blocks.num_pins.values.take(rows) != 0
        is_kept = (state == BlockState.PROMOTING) | is_pinned & (state != BlockState.SEALED)
        return is_present & ~is_kept

    @property
    def num_pending(self) -> int:
        """Blocks that wait to be written or are being written; some that wait have gone."""
        return len(self._queue) + len(self._demotions)

    def check(self) -> None:
        """Asserts that copies, moves and bytes agree with the rows."""
        blocks, state = self._blocks, self._blocks.state.at
        stored = np.flatnonzero(blocks.disk.values == DiskState.PRESENT)
        writing = np.flatnonzero(blocks.disk.values == DiskState.WRITING)
        self.leaves.check(stored)
        everything = blocks.num_bytes.values[[*stored, *writing]].tolist()
        assert self.num_bytes == sum(map(file_num_bytes, everything)) <= self.capacity_num_bytes
        assert set(writing.tolist()) == set(self._demotions), "a copy is written by nobody"
        reading = np.flatnonzero(blocks.state.values == BlockState.PROMOTING)
        assert set(reading.tolist()) == set(self._promotions), "a slot waits for no read"
        assert all(blocks.disk.at[row] == DiskState.PRESENT for row in self._promotions)
        for row in [*self._demotions, *self._arrived]:
            assert state[row] in (BlockState.SEALED, BlockState.DROPPED)

    def held_rows(self) -> RowArray:
        """The rows that moves hold, each once a hold."""
        return np.array([*self._demotions, *self._arrived], dtype=np.int64)

    def _make_room(self, num_bytes: int) -> bool:
        """Removes the least recently used copies until num_bytes fit."""
        while self.num_bytes + num_bytes > self.capacity_num_bytes:
            victim = self.leaves.peek()
            if victim == NOBODY:
                return False
            self.forget(victim)
        return True

    def _enter(self, row: int) -> None:
        self._blocks.disk.at[row] = DiskState.PRESENT
        self.num_bytes += file_num_bytes(self._blocks.num_bytes.at[row])
        self._blocks.report(row)
        self.leaves.enter(row)

    def _move(self, row: int) -> Move:
        blocks = self._blocks
        header = Header(
            key=blocks.name_of(row),
            num_bytes=blocks.num_bytes.at[row],
            digest=blocks.digest.at[row],
        )
        return Move(row=row, offset=blocks.offset.at[row], header=header)

    def _known_prefix(self, keys: Sequence[bytes], num_bytes: int) -> RowArray:
        """Rows of the leading keys that are sealed, on disk, or on their way from there."""
        blocks, rows = self._blocks, self._blocks.find(keys)
        state, disk = blocks.state.values.take(rows), blocks.disk.values.take(rows)
        is_known = (state == BlockState.SEALED) | (state == BlockState.PROMOTING)
        is_known |= (state == BlockState.ABSENT) & (disk == DiskState.PRESENT)
        is_known &= blocks.num_bytes.values.take(rows) == num_bytes
        return leading(rows, is_known)
