"""What was promised about blocks that must stay: nothing pinned is evicted while its pin lives.

Owns pins and the limit on their bytes. A block that leaves the store all the same, as corrupt, is
forgotten by its pins. How long a pin lives is the index's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.kvstore.block import BlockState, Place
from services.kvstore.blocks import Blocks
from services.kvstore.eviction import LruLeaves
from services.kvstore.rows import RowArray, leading


@dataclass(slots=True, kw_only=True, eq=False)
class Pin:
    """Blocks that stay where they are while it lives; each once."""

    owner: str
    rows: RowArray


class Pins:
    """Pins by id, over blocks of at most max_num_bytes in all; `tiers` evict what they let go."""

    def __init__(self, blocks: Blocks, tiers: Sequence[LruLeaves], max_num_bytes: int) -> None:
        self._blocks = blocks
        self._tiers = tiers
        self._max_num_bytes = max_num_bytes
        self.num_bytes = 0  # of blocks with a pin
        self.live: dict[int, Pin] = {}
        blocks.on_gone = self._forget

    def prefix(self, keys: Sequence[bytes]) -> RowArray:
        """The leading blocks of the keys that the store has, as many as may be pinned."""
        blocks, rows = self._blocks, self._blocks.find(keys)
        has_place = blocks.place.values.take(rows) != Place.NONE
        # Who writes a block anew may yet replace its copies, and take it away as private.
        has_place &= blocks.state.values.take(rows) != BlockState.RESERVED
        has_place &= ~blocks.is_private.values.take(rows)
        rows = leading(rows, has_place)
        is_new = np.zeros(len(rows), dtype=np.bool_)
        is_new[np.unique(rows, return_index=True)[1]] = True
        is_new &= blocks.num_pins.values.take(rows) == 0
        num_bytes = np.where(is_new, blocks.num_bytes.values.take(rows), 0).cumsum()
        return leading(rows, num_bytes <= self._max_num_bytes - self.num_bytes)

    def begin(self, pin_id: int, owner: str, rows: RowArray) -> None:
        """Pins blocks; some may be there twice, and some may have pins."""
        rows = np.unique(rows)
        num_pins = self._blocks.num_pins.values
        self.num_bytes += self._num_bytes_of(rows[num_pins.take(rows) == 0])
        num_pins[rows] += 1
        self.live[pin_id] = Pin(owner=owner, rows=rows)

    def end(self, pin_id: int) -> None:
        """Lets blocks go."""
        rows, num_pins = self.live.pop(pin_id).rows, self._blocks.num_pins.values
        num_pins[rows] -= 1
        free = rows[num_pins.take(rows) == 0]
        self.num_bytes -= self._num_bytes_of(free)
        for leaves in self._tiers:
            leaves.offer_all(free)

    def of_owner(self, owner: str) -> list[int]:
        """Ids of all pins of an owner."""
        return [pin_id for pin_id, pin in self.live.items() if pin.owner == owner]

    def check(self) -> None:
        """Asserts that the rows count their pins, that what is pinned is there, and the limit."""
        blocks, num_pins = self._blocks, np.zeros_like(self._blocks.num_pins.values)
        for pin in self.live.values():
            num_pins[pin.rows] += 1
        assert (num_pins == blocks.num_pins.values).all(), "pins and rows disagree"
        pinned = np.flatnonzero(num_pins)
        assert (blocks.place.values[pinned] != Place.NONE).all(), "a pinned block is nowhere"
        assert (blocks.state.values[pinned] != BlockState.RESERVED).all(), "it is being replaced"
        assert not blocks.is_private.values[pinned].any(), "a private block is pinned"
        assert self.num_bytes == self._num_bytes_of(pinned) <= self._max_num_bytes

    def _forget(self, row: int) -> None:
        """A pinned block has left the store: rare, so that pins need not know who has which."""
        self._blocks.num_pins.at[row] = 0
        self.num_bytes -= self._blocks.num_bytes.at[row]
        for pin in self.live.values():
            pin.rows = pin.rows[pin.rows != row]

    def _num_bytes_of(self, rows: RowArray) -> int:
        return int(self._blocks.num_bytes.values.take(rows).sum())
