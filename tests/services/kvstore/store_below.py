"""The middle tier of a World: copies of real bytes between the arena and DRAM, half by half.

It plays the threads. A copy of a damaged block is damaged, too; nothing else may go wrong here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.kvstore.arena import DramArena
from services.kvstore.block import BlockState
from services.kvstore.index import BlockIndex
from services.kvstore.lower_tier import LowerTier, Move
from services.kvstore.rows import NAME_NUM_BYTES
from services.kvstore.tiers import Promoted
from tests.services.kvstore.promotions import promote
from tests.services.kvstore.store_ledger import NUM_HOST, NUM_PARTS, SIZE, Life, State, Write

STORE = "store"  # who owns a slot while a block comes back


@dataclass(frozen=True, slots=True, kw_only=True)
class Copying:
    """A move, and whose bytes the slot has or gets."""

    move: Move
    write: Write


class Below:
    """Host memory behind one life's arena; `damaged` by offset of a copy."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._memory = DramArena(NUM_HOST * SIZE)
        self.demotions: list[Copying] = []
        self.promotions: list[Copying] = []
        self.arrived: list[Copying] = []
        self._damaged: dict[int, bool] = {}
        self._keys: set[bytes] = set()  # of blocks that were copied once

    def copied(self) -> list[bytes]:
        """Keys of blocks that have a copy."""
        find = self._index._blocks.row_of
        return [key for key in sorted(self._keys) if self._tier.has(find(key))]

    def has_returned(self, write: Write) -> bool:
        """Whether a block is in the arena again, in a slot that its writer never had."""
        granted = self._life.granted
        return any(
            w.owner == STORE and w.key == write.key and w.state is State.SEALED for w in granted
        )

    def begin_demotion(self) -> None:
        """Half of a block's bytes, if one waits."""
        move = self._tier.next_demotion()
        if move is None:
            return
        (write,) = (w for w in self._life.granted if w.offset == move.offset)
        assert write.state is State.SEALED and name_of(write.key) == move.header.key
        busy = {other.move.copy_offset for other in self.demotions + self.promotions}
        assert move.copy_offset not in busy, "DRAM is in two hands"
        copying = Copying(move=move, write=write)
        self._copy(copying, 0, is_down=True)
        self.demotions.append(copying)

    def end_demotion(self, copying: Copying, is_written: bool) -> None:
        """The other half, or failure."""
        self.demotions.remove(copying)
        write, move = copying.write, copying.move
        assert write in self._life.granted, "a slot was reused while it was copied"
        if is_written:
            self._copy(copying, 1, is_down=True)
            self._check(copying, write.is_damaged)
            self._damaged[move.copy_offset] = write.is_damaged
            self._keys.add(write.key)
        self._tier.demoted(move, is_written)

    def begin_promotion(self, keys: Sequence[bytes]) -> list[Copying]:
        """Half of the bytes of each block that DRAM alone has; their slots are to be granted."""
        for copying in self.arrived:
            self._index.lower.settle(copying.move)
        self.arrived.clear()
        moves, _ = promote(self._index.lower, keys, SIZE, self._index.lower.all)
        begun: list[Copying] = []
        for move in moves:
            write = Write(
                life=self._life,
                owner=STORE,
                key=move.header.key.rstrip(b"\0"),
                offset=move.offset,
                num_bytes=move.header.num_bytes,
                reservation_id=0,
                deadline=math.inf,
                is_damaged=self._damaged[move.copy_offset],
            )
            begun.append(Copying(move=move, write=write))
            self._copy(begun[-1], 0, is_down=False)
        self.promotions += begun
        return begun

    def end_promotion(self, copying: Copying, outcome: Promoted, awaits: bool = True) -> None:
        """The other half and the books, or failure."""
        self.promotions.remove(copying)
        if outcome is Promoted.DONE:
            if awaits:
                self._copy(copying, 1, is_down=False)
                self._check(copying, self._damaged[copying.move.copy_offset])
            self.arrived.append(copying)
        self._index.lower.promoted(copying.move, outcome)
        copying.write.state = State.SEALED if outcome is Promoted.DONE else State.ENDED

    def check_gone(self, key: bytes) -> None:
        """Asserts that a block which was just reported has no copy that could be promoted."""
        blocks = self._index._blocks
        row = blocks.row_of(key)
        if blocks.state.at[row] != BlockState.PROMOTING:
            assert not self._tier.has(row), "a reported block has a copy"

    def finish(self) -> None:
        """Fails what is under way."""
        for copying in list(self.demotions):
            self.end_demotion(copying, is_written=False)
        for copying in list(self.promotions):
            self.end_promotion(copying, Promoted.ABANDONED)
        self.begin_promotion([])

    @property
    def _index(self) -> BlockIndex:
        return self._life.index

    @property
    def _tier(self) -> LowerTier:
        assert self._index.lower.host is not None
        return self._index.lower.host

    def _copy(self, copying: Copying, half: int, is_down: bool) -> None:
        part = copying.write.part(half)
        slot = self._life.slot_of(copying.write)[part]
        there = self._copy_of(copying)[part]
        if is_down:
            there[:] = slot
        else:
            slot[:] = there

    def _check(self, copying: Copying, is_damaged: bool) -> None:
        there = self._copy_of(copying).tobytes()
        assert is_damaged or there == copying.write.content, "DRAM has other bytes than were sealed"

    def _copy_of(self, copying: Copying) -> np.ndarray:
        first = copying.move.copy_offset
        return self._memory.memory[first : first + copying.write.num_bytes]


def name_of(key: bytes) -> bytes:
    """A key as the books have it."""
    return key.ljust(NAME_NUM_BYTES, b"\0")


assert NUM_PARTS == 2, "copies are made in halves"
