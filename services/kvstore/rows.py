"""Rows by 32-byte name, and columns of values for them: a block costs its values, not objects.

Owns which name has which row. Many rows are worked on at once through a column's array, single ones
through its memoryview. Knows no blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

NAME_NUM_BYTES = 32
NOBODY = 0  # the row of an unknown name; its values stay 0
_NAME_WORDS = NAME_NUM_BYTES // 8
_MIN_ROWS = 1024
_FACTOR = 0x9E3779B97F4A7C15  # spreads names that differ in few bits; those of blocks are digests
_MASK = 2**64 - 1

RowArray = NDArray[np.int64]


class Column:
    """A value per row: `values` for many rows at once, `at[row]` for one, without numpy's cost.

    Both are replaced when the table grows: `add` may do that.
    """

    __slots__ = ("at", "values")

    def __init__(self, num_rows: int, dtype: DTypeLike) -> None:
        self._set(np.zeros(num_rows, dtype=dtype))

    def grow(self, num_rows: int) -> None:
        """More rows, all 0."""
        values = np.zeros(num_rows, dtype=self.values.dtype)
        values[: len(self.values)] = self.values
        self._set(values)

    def _set(self, values: NDArray[Any]) -> None:
        self.values: NDArray[Any] = values
        self.at: memoryview[int] = memoryview(values)  # pyright: ignore[reportArgumentType]


class Rows:
    """A table with open addressing and linear probing, never more than half full."""

    def __init__(self) -> None:
        self._names = Column(_MIN_ROWS * _NAME_WORDS, np.uint64)
        self._buckets = Column(2 * _MIN_ROWS, np.int32)  # rows; NOBODY where nothing is
        self._columns: list[Column] = []
        self._num_rows = _MIN_ROWS
        self._watermark = NOBODY + 1  # rows handed out at least once
        self._returned: list[int] = []
        self._num_named = 0
        self._shift = _shift(2 * _MIN_ROWS)

    def __len__(self) -> int:
        return self._num_named

    def column(self, dtype: DTypeLike) -> Column:
        """A new column; it grows with the table."""
        column = Column(self._num_rows, dtype)
        self._columns.append(column)
        return column

    def add(self, name: bytes) -> int:
        """The new row of a name that has none. Its values are those its last owner left."""
        if self._returned:
            row = self._returned.pop()
        else:
            if self._watermark == self._num_rows:
                self._grow()
            row = self._watermark
            self._watermark += 1
        self._write_name(row, name)
        self._buckets.at[self._bucket(name)] = row
        self._num_named += 1
        return row

    def unname(self, row: int) -> None:
        """Makes a row's name unknown; the row stays until it is freed."""
        buckets, mask = self._buckets.at, len(self._buckets.at) - 1
        hole = self._home(row)
        while buckets[hole] != row:
            hole = (hole + 1) & mask
        probe = hole
        while (other := buckets[probe := (probe + 1) & mask]) != NOBODY:
            # A row may fill the hole if the hole is not before the row's home.
            if (probe - self._home(other)) & mask >= (probe - hole) & mask:
                buckets[hole], hole = other, probe
        buckets[hole] = NOBODY
        self._num_named -= 1

    def free(self, row: int) -> None:
        """Gives a nameless row to the next name."""
        self._returned.append(row)

    def find(self, names: Sequence[bytes]) -> RowArray:
        """The row of each name, NOBODY where there is none. [num_names]"""
        wanted = np.frombuffer(_join(names), dtype=np.uint64).reshape(-1, _NAME_WORDS)
        known = self._names.values.reshape(-1, _NAME_WORDS)
        buckets, mask = self._buckets.values, np.uint64(len(self._buckets.values) - 1)
        at = self._homes(wanted)
        rows = buckets[at].astype(np.int64)
        is_other = (known[rows] != wanted).any(axis=1) & (rows != NOBODY)
        pending = np.flatnonzero(is_other)
        while len(pending):
            at = (at[is_other] + np.uint64(1)) & mask
            found = buckets[at]
            rows[pending] = found
            is_other = (known[found] != wanted[pending]).any(axis=1) & (found != NOBODY)
            pending = pending[is_other]
        return rows

    def row_of(self, name: bytes) -> int:
        """The row of one name, or NOBODY."""
        return self._buckets.at[self._bucket(name)]

    def name_of(self, row: int) -> bytes:
        """The name a row has, or had last."""
        return self._names.values[row * _NAME_WORDS : (row + 1) * _NAME_WORDS].tobytes()

    def named(self) -> RowArray:
        """All rows that have a name, in no order."""
        return self._buckets.values[self._buckets.values != NOBODY].astype(np.int64)

    def check(self) -> None:
        """Asserts that every name leads to its row and that no row is both named and free."""
        named = self.named()
        assert len(named) == self._num_named == len(set(named.tolist())), "a row has two names"
        assert not set(named.tolist()) & set(self._returned), "a named row is free"
        assert len(set(self._returned)) == len(self._returned), "a row is free twice"
        for row in named.tolist():
            assert self.row_of(self.name_of(row)) == row, "a name leads to another row"

    def _bucket(self, name: bytes) -> int:
        """Where the row of a name is, or would be."""
        words = _words(name)
        names, buckets, mask = self._names.at, self._buckets.at, len(self._buckets.at) - 1
        at = self._home_of(words)
        while row := buckets[at]:
            first = row * _NAME_WORDS
            if names[first] == words[0] and names[first : first + _NAME_WORDS] == words:
                break
            at = (at + 1) & mask
        return at

    def _home(self, row: int) -> int:
        return self._home_of(self._names.at[row * _NAME_WORDS : (row + 1) * _NAME_WORDS])

    def _home_of(self, words: memoryview[int]) -> int:
        a, b, c, d = words
        return ((a ^ b ^ c ^ d) * _FACTOR & _MASK) >> self._shift

    def _homes(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The same for many names, [num_names, 4]."""
        mixed = words[:, 0] ^ words[:, 1] ^ words[:, 2] ^ words[:, 3]
        return (mixed * np.uint64(_FACTOR)) >> np.uint64(self._shift)

    def _write_name(self, row: int, name: bytes) -> None:
        self._names.at[row * _NAME_WORDS : (row + 1) * _NAME_WORDS] = _words(name)

    def _grow(self) -> None:
        self._num_rows *= 2
        for column in self._columns:
            column.grow(self._num_rows)
        self._names.grow(self._num_rows * _NAME_WORDS)
        pending = self.named()
        self._buckets = Column(2 * self._num_rows, np.int32)
        self._shift = _shift(2 * self._num_rows)
        buckets, mask = self._buckets.values, np.uint64(2 * self._num_rows - 1)
        at = self._homes(self._names.values.reshape(-1, _NAME_WORDS)[pending])
        while len(pending):  # a bucket that several rows want goes to the one written last
            is_free = buckets[at] == NOBODY
            buckets[at[is_free]] = pending[is_free]
            has_lost = buckets[at] != pending
            pending, at = pending[has_lost], (at[has_lost] + np.uint64(1)) & mask


def _shift(num_buckets: int) -> int:
    """So that a 64-bit hash becomes a bucket; num_buckets is a power of two."""
    return 65 - num_buckets.bit_length()


def leading(rows: RowArray, is_wanted: NDArray[np.bool_]) -> RowArray:
    """The rows before the first that is not wanted."""
    return rows if is_wanted.all() else rows[: is_wanted.argmin()]


def _join(names: Sequence[bytes]) -> bytes:
    """All names in one run; shorter ones are padded with zeros."""
    joined = b"".join(names)
    if len(joined) == NAME_NUM_BYTES * len(names):
        return joined
    return b"".join(name.ljust(NAME_NUM_BYTES, b"\0") for name in names)


def _words(name: bytes) -> memoryview[int]:
    return memoryview(name.ljust(NAME_NUM_BYTES, b"\0")).cast("L")
