"""All tiers below the arena, fastest first, and the blocks that come back from them.

Owns promotions: while a block is read back nobody but its move has its slot, and when it has come
it is held until everyone who asked has a lease. Pure, as the tiers are; bytes are copied elsewhere.

Keys are hash chains from the model's fingerprint, so that what another model left on the disk is
never asked for; it is the least recently used and goes first.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from services.kvstore.arena import SlotAllocator
from services.kvstore.block import BlockState, Place
from services.kvstore.blocks import Blocks
from services.kvstore.disk_format import Header
from services.kvstore.lower_tier import LowerTier, Move
from services.kvstore.memory import MemoryTier
from services.kvstore.room import FileRoom, SlotRoom
from services.kvstore.rows import NOBODY, RowArray, leading

_PART_LEN = 64  # blocks


class Promoted(enum.Enum):
    """How a read from a lower tier ended."""

    DONE = enum.auto()  # the slot has the bytes that the tier kept
    UNUSABLE = enum.auto()  # the tier does not have them
    ABANDONED = enum.auto()  # nothing was read


class LowerTiers:
    """Host memory of host_num_bytes and a directory of disk_num_bytes; 0 is no such tier."""

    def __init__(
        self, blocks: Blocks, memory: MemoryTier, *, host_num_bytes: int, disk_num_bytes: int
    ) -> None:
        self._blocks = blocks
        self._memory = memory
        self.host: LowerTier | None = None
        self.disk: LowerTier | None = None
        self._files = FileRoom(blocks, disk_num_bytes)
        if host_num_bytes:
            room = SlotRoom(blocks, SlotAllocator(host_num_bytes))
            self.host = LowerTier("dram", Place.HOST, blocks, memory, room)
        if disk_num_bytes:
            self.disk = LowerTier("disk", Place.DISK, blocks, memory, self._files)
        self.all: list[LowerTier] = [tier for tier in (self.host, self.disk) if tier is not None]
        self._promotions: dict[int, Move] = {}
        self._arrived: set[int] = set()  # promoted, held until everyone who asked has a lease

    def load(self, headers: Iterable[Header]) -> None:
        """Takes what a former life left on disk, least recently used first."""
        assert self.disk is not None
        blocks = self._blocks
        for header in headers:
            row = blocks.open(header.key, NOBODY)
            blocks.num_bytes.at[row], blocks.digest.at[row] = header.num_bytes, header.digest
            blocks.touch(row)
            if not self.disk.keep(row):
                blocks.let_go(row)
                self._files.refuse(header.key)

    def forget_other(self, row: int, num_bytes: int) -> None:
        """Drops copies of a block that is about to be written anew, in another size."""
        if self._blocks.num_bytes.at[row] != num_bytes:
            self.forget(row)

    def on_sealed(self, row: int, digest: int) -> None:
        """A block that is sealed now is about to get its digest; it is to be copied."""
        if self._blocks.digest.at[row] != digest:
            self.forget(row)
        for tier in self.all:
            tier.offer(row)

    def forget(self, row: int) -> bool:
        """Drops a block's copies, slowest first: watchers are told once. Whether it had any."""
        had_any = False
        for tier in reversed(self.all):
            if tier.has(row):
                tier.forget(row)
                had_any = True
        return had_any

    def promote(
        self, keys: Sequence[bytes], num_bytes: int, sources: Sequence[LowerTier]
    ) -> Iterator[tuple[list[Move], list[int]]]:
        """Takes slots for what is below only of the longest prefix that arena and sources have.

        Gives the reads to start, and the rows of all reads under way that the prefix waits for.
        Part by part: the first blocks can be on their way while slots are taken for the others.
        """
        blocks = self._blocks
        rows = self._known_prefix(keys, num_bytes, sources)
        if (blocks.state.values.take(rows) == BlockState.SEALED).all():
            return
        blocks.touch_chain(rows)
        for first in range(0, len(rows), _PART_LEN):
            part = rows[first : first + _PART_LEN].tolist()
            moves, awaited, is_whole = self._promote_part(part, num_bytes, sources)
            yield moves, awaited
            if not is_whole:
                return

    def _promote_part(
        self, rows: list[int], num_bytes: int, sources: Sequence[LowerTier]
    ) -> tuple[list[Move], list[int], bool]:
        """Reads to start, rows to wait for, and whether all rows will be in the arena then."""
        blocks = self._blocks
        moves: list[Move] = []
        awaited: list[int] = []
        for row in rows:
            if blocks.state.at[row] == BlockState.ABSENT:
                move = self._begin(row, num_bytes, sources)
                if move is None:
                    return moves, awaited, False
                moves.append(move)
            if blocks.state.at[row] != BlockState.PROMOTING:
                continue
            if self._promotions[row].tier not in sources:
                return moves, awaited, False
            awaited.append(row)
        return moves, awaited, True

    def promoted(self, move: Move, outcome: Promoted) -> None:
        """Ends a read. A block that is DONE is sealed, and held until it is settled.

        Tiers above the one that it came from get a copy again.
        """
        row = move.row
        del self._promotions[row]
        if outcome is Promoted.DONE:
            self._blocks.state.at[row] = BlockState.SEALED
            self._blocks.report(row)
            self._memory.hold(np.array([row]))
            self._arrived.add(row)
            for tier in self.all[: self.all.index(move.tier)]:
                tier.offer(row)
        if outcome is Promoted.UNUSABLE:
            move.tier.forget(row)
        if outcome is not Promoted.DONE:
            self._memory.evict(row)
        for tier in self.all:
            tier.leaves.offer(row)

    def settle(self, move: Move) -> None:
        """Ends the hold on a promoted block."""
        self._arrived.remove(move.row)
        self._memory.unhold(np.array([move.row]))

    def check(self) -> None:
        """Asserts that tiers and promotions agree with the rows."""
        for tier in self.all:
            tier.check()
        state = self._blocks.state
        reading = np.flatnonzero(state.values == BlockState.PROMOTING)
        assert set(reading.tolist()) == set(self._promotions), "a slot waits for no read"
        assert all(move.tier.has(row) for row, move in self._promotions.items())
        for row in self._arrived:
            assert state.at[row] in (BlockState.SEALED, BlockState.DROPPED)

    def held_rows(self) -> RowArray:
        """The rows that moves hold, each once a hold."""
        demoting = [row for tier in self.all for row in tier.held_rows()]
        return np.array([*demoting, *self._arrived], dtype=np.int64)

    def _begin(self, row: int, num_bytes: int, sources: Sequence[LowerTier]) -> Move | None:
        """Takes a slot for a block below; None without a source, or without room for it."""
        limit = self._memory.num_bytes // 2  # blocks that are being read are in nobody's use
        if (len(self._promotions) + 1) * num_bytes > limit:
            return None
        source = next((tier for tier in sources if tier.has(row)), None)
        if source is None:
            return None  # evicted a moment ago, to make room for the blocks before it
        offset = self._memory.take(num_bytes, self._blocks.tenant.at[row])
        if offset is None:
            return None
        self._memory.place(row, offset, num_bytes, BlockState.PROMOTING)
        move = self._promotions[row] = source.move(row)
        return move

    def _known_prefix(
        self, keys: Sequence[bytes], num_bytes: int, sources: Sequence[LowerTier]
    ) -> RowArray:
        """Rows of the leading keys that are sealed, in a source, or on their way from there."""
        blocks, rows = self._blocks, self._blocks.find(keys)
        state = blocks.state.values.take(rows)
        is_known = (state == BlockState.SEALED) | (state == BlockState.PROMOTING)
        is_absent = state == BlockState.ABSENT
        for tier in sources:
            is_known |= is_absent & tier.have(rows)
        is_known &= blocks.num_bytes.values.take(rows) == num_bytes
        return leading(rows, is_known)
