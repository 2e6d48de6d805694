"""What a lower tier's copies take: bytes of a directory, or slots of host memory.

Owns what is taken of a tier's budget and where a copy is; never decides which copy goes, never
touches bytes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from services.kvstore.arena import SlotAllocator
from services.kvstore.blocks import Blocks
from services.kvstore.disk_format import DIGEST_UNIT, file_num_bytes
from services.kvstore.rows import RowArray


class Room(Protocol):
    """The budget of one tier; a copy is a row's, and has one place while it lasts."""

    num_bytes: int  # taken
    capacity_num_bytes: int

    def is_fit(self, num_bytes: int) -> bool:
        """Whether an empty tier would hold a block of num_bytes."""
        ...

    def take(self, row: int) -> bool:
        """Takes what a block's copy needs; False when that is not free."""
        ...

    def cancel(self, row: int) -> None:
        """Gives back what was taken for a copy that was not made."""
        ...

    def remove(self, row: int) -> None:
        """Gives back what a copy had; the copy is to go."""
        ...

    def take_removed(self) -> list[bytes]:
        """Keys of copies that somebody has to remove before any later one is written."""
        ...

    def offset_of(self, row: int) -> int:
        """Where a copy is, if offsets tell."""
        ...

    def check(self, rows: RowArray) -> None:
        """Asserts that what is taken is what the rows' copies need."""
        ...


class FileRoom:
    """Files in one directory, which has room for num_bytes of them."""

    def __init__(self, blocks: Blocks, num_bytes: int) -> None:
        self._blocks = blocks
        self.num_bytes = 0
        self.capacity_num_bytes = num_bytes
        self._removed: list[bytes] = []

    def is_fit(self, num_bytes: int) -> bool:
        """Whether it has a digest, to be verified when it comes back, and fits."""
        return not num_bytes % DIGEST_UNIT and file_num_bytes(num_bytes) <= self.capacity_num_bytes

    def take(self, row: int) -> bool:
        """Counts a file."""
        num_bytes = self.num_bytes + self._needed(row)
        if num_bytes > self.capacity_num_bytes:
            return False
        self.num_bytes = num_bytes
        return True

    def cancel(self, row: int) -> None:
        """Counts a file no more."""
        self.num_bytes -= self._needed(row)

    def remove(self, row: int) -> None:
        """The same for a file that exists."""
        self.cancel(row)
        self._removed.append(self._blocks.name_of(row))

    def refuse(self, key: bytes) -> None:
        """A file that was found and has no room is to go."""
        self._removed.append(key)

    def take_removed(self) -> list[bytes]:
        """Keys whose files are to be removed."""
        removed, self._removed = self._removed, []
        return removed

    def offset_of(self, row: int) -> int:
        """0: a file is found by its name."""
        return 0

    def check(self, rows: RowArray) -> None:
        """Asserts that bytes agree."""
        assert self.num_bytes == sum(map(self._needed, rows.tolist())) <= self.capacity_num_bytes

    def _needed(self, row: int) -> int:
        return file_num_bytes(self._blocks.num_bytes.at[row])


class SlotRoom:
    """Slots of memory that is not the arena. Its slots are reused at once: nothing is removed."""

    def __init__(self, blocks: Blocks, slots: SlotAllocator) -> None:
        self._blocks = blocks
        self._slots = slots
        self._offset = blocks.column(np.int64)
        self.num_bytes = 0
        self.capacity_num_bytes = slots.num_bytes

    def is_fit(self, num_bytes: int) -> bool:
        """Whether it fits."""
        return num_bytes <= self.capacity_num_bytes

    def take(self, row: int) -> bool:
        """A slot."""
        num_bytes = self._blocks.num_bytes.at[row]
        offset = self._slots.allocate(num_bytes)
        if offset is None:
            return False
        self._offset.at[row] = offset
        self.num_bytes += num_bytes
        return True

    def cancel(self, row: int) -> None:
        """Frees a slot."""
        self._slots.free(self._offset.at[row])
        self.num_bytes -= self._blocks.num_bytes.at[row]

    def remove(self, row: int) -> None:
        """The same: bytes in a free slot are nobody's."""
        self.cancel(row)

    def take_removed(self) -> list[bytes]:
        """Never any."""
        return []

    def offset_of(self, row: int) -> int:
        """Where a copy's slot begins."""
        return self._offset.at[row]

    def check(self, rows: RowArray) -> None:
        """Asserts that every slot is one copy's."""
        self._slots.check()
        offsets = self._offset.values[rows].tolist()
        assert len(set(offsets)) == len(offsets), "a slot has two copies"
        assert set(offsets) == self._slots.used_offsets, "a slot of a lower tier is leaked"
        assert self.num_bytes == int(self._blocks.num_bytes.values[rows].sum())
