"""The last changes of what the store has, in a ring, numbered from 1 without gaps.

Owns the numbers and the ring. Never knows who reads it (feed.py): a reader that is too slow finds
its changes overwritten, and nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.kvstore.block import Place
from services.kvstore.rows import NAME_NUM_BYTES, Column, as_names

NUM_CHANGES = 65_536
_NAME_WORDS = NAME_NUM_BYTES // 8
_BEFORE = 4  # bits: before << _BEFORE | after


class Journal:
    """Changes of single keys: where the block was, and where it is now."""

    def __init__(self, num_changes: int = NUM_CHANGES) -> None:
        if num_changes < 1:
            raise ValueError(f"a journal of {num_changes} changes; at least 1 is needed")
        self.capacity = num_changes
        self.next_sequence = 1
        self.sleepers: set[Callable[[], None]] = set()  # called once, with the next change
        self._names = Column(num_changes * _NAME_WORDS, np.uint64)
        self._places = Column(num_changes, np.uint8)

    @property
    def first_sequence(self) -> int:
        """The oldest change that is still here."""
        return max(1, self.next_sequence - self.capacity)

    def record(self, words: memoryview[int], before: int, after: int) -> None:
        """A key, four words, is in another place from now on."""
        at = self.next_sequence % self.capacity
        first = at * _NAME_WORDS
        self._names.at[first : first + _NAME_WORDS] = words
        self._places.at[at] = before << _BEFORE | after
        self.next_sequence += 1
        if self.sleepers:
            sleepers, self.sleepers = self.sleepers, set()
            for wake in sleepers:
                wake()

    def read(self, sequence: int, limit: int) -> tuple[list[bytes], NDArray[Any], NDArray[Any]]:
        """Keys of up to `limit` changes from `sequence` on, places before and after. [num]"""
        assert self.first_sequence <= sequence <= self.next_sequence
        num_changes = min(limit, self.next_sequence - sequence)
        at = np.arange(sequence, sequence + num_changes) % self.capacity
        places = self._places.values[at]
        keys = as_names(self._names.values.reshape(-1, _NAME_WORDS)[at])
        return keys, places >> _BEFORE, places & (2**_BEFORE - 1)

    def check(self) -> None:
        """Asserts that every change in the ring is one."""
        _, before, after = self.read(self.first_sequence, self.capacity)
        assert (before != after).all(), "a change that changes nothing"
        assert max(*before, *after, 0, 0) <= max(Place)
