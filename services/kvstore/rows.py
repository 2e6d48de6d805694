"""Rows by 32-byte name, and columns of values for them: a block costs its values, not objects.

Owns which name has which row. Many rows are worked on at once through a column's array, single ones
through its memoryview. Knows no blocks.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

NAME_NUM_BYTES = 32
NOBODY = 0  # the row of an unknown name; its values stay 0
_NAME_WORDS = NAME_NUM_BYTES // 8
_MIN_ROWS = 1024
_SPREAD = 4  # buckets a row: names that share one are looked up in turns
_FACTOR = 0x9E3779B97F4A7C15  # spreads names that differ in few bits; those of blocks are digests
_MASK = 2**64 - 1
_unpack = struct.Struct("=4Q").unpack

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
    """A table with open addressing and linear probing, at most a quarter full."""

    def __init__(self) -> None:
        self._names = Column(_MIN_ROWS * _NAME_WORDS, np.uint64)
        self._buckets = Column(_SPREAD * _MIN_ROWS, np.int32)  # rows; NOBODY where nothing is
        self._columns: list[Column] = []
        self._num_rows = _MIN_ROWS
        self._watermark = NOBODY + 1  # rows handed out at least once
        self._returned: list[int] = []
        self._num_named = 0
        self._shift = _shift(_SPREAD * _MIN_ROWS)

    def __len__(self) -> int:
        return self._num_named

    @property
    def end(self) -> int:
        """No row from here on was ever used."""
        return self._watermark

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
        words = _unpack(name.ljust(NAME_NUM_BYTES, b"\0"))
        first, names = row * _NAME_WORDS, self._names.at
        names[first], names[first + 1], names[first + 2], names[first + 3] = words
        self._buckets.at[self._bucket(words)] = row
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
        buckets, last = self._buckets.values, len(self._buckets.values) - 1
        at = self._homes(wanted)
        rows = buckets.take(at).astype(np.int64)
        pending = np.flatnonzero((rows != NOBODY) & _differ(known.take(rows, axis=0), wanted))
        while len(pending):
            at[pending] = (at.take(pending) + 1) & last
            found = buckets.take(at.take(pending))
            rows[pending] = found
            others = known.take(found, axis=0)
            pending = pending[(found != NOBODY) & _differ(others, wanted.take(pending, axis=0))]
        return rows

    def row_of(self, name: bytes) -> int:
        """The row of one name, or NOBODY."""
        return self._buckets.at[self._bucket(_unpack(name.ljust(NAME_NUM_BYTES, b"\0")))]

    def name_of(self, row: int) -> bytes:
        """The name a row has, or had last."""
        return self._names.values[row * _NAME_WORDS : (row + 1) * _NAME_WORDS].tobytes()

    def names_of(self, rows: RowArray) -> list[bytes]:
        """The same for many."""
        return as_names(self._names.values.reshape(-1, _NAME_WORDS)[rows])

    def words_of(self, row: int) -> memoryview[int]:
        """The same as words, without a copy."""
        return self._names.at[row * _NAME_WORDS : (row + 1) * _NAME_WORDS]

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

    def _bucket(self, words: tuple[int, ...]) -> int:
        """Where the row of a name is, or would be."""
        a, b, c, d = words
        names, buckets = self._names.at, self._buckets.at
        at = ((a ^ b ^ c ^ d) * _FACTOR & _MASK) >> self._shift
        while row := buckets[at]:
            first = row * _NAME_WORDS
            # One word nearly always tells two names apart.
            if names[first] == a and tuple(names[first : first + _NAME_WORDS]) == words:
                break
            at = (at + 1) & (len(buckets) - 1)
        return at

    def _home(self, row: int) -> int:
        a, b, c, d = self._names.at[row * _NAME_WORDS : (row + 1) * _NAME_WORDS]
        return ((a ^ b ^ c ^ d) * _FACTOR & _MASK) >> self._shift

    def _homes(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The same for many names, [num_names, 4]."""
        mixed = words[:, 0] ^ words[:, 1] ^ words[:, 2] ^ words[:, 3]
        return ((mixed * np.uint64(_FACTOR)) >> np.uint64(self._shift)).astype(np.int64)

    def _grow(self) -> None:
        self._num_rows *= 2
        for column in self._columns:
            column.grow(self._num_rows)
        self._names.grow(self._num_rows * _NAME_WORDS)
        pending = self.named()
        self._buckets = Column(_SPREAD * self._num_rows, np.int32)
        self._shift = _shift(_SPREAD * self._num_rows)
        buckets = self._buckets.values
        at = self._homes(self._names.values.reshape(-1, _NAME_WORDS)[pending])
        while len(pending):  # a bucket that several rows want goes to the one written last
            is_free = buckets[at] == NOBODY
            buckets[at[is_free]] = pending[is_free]
            has_lost = buckets[at] != pending
            pending, at = pending[has_lost], (at[has_lost] + 1) & (len(buckets) - 1)


def as_names(words: NDArray[np.uint64]) -> list[bytes]:
    """Names as strings of bytes, from [num_names, 4] words."""
    data = words.tobytes()
    return [data[at : at + NAME_NUM_BYTES] for at in range(0, len(data), NAME_NUM_BYTES)]


def _differ(names: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether two names are not the same, row by row; a reduction over the axis is slower."""
    words = (names[:, word] != others[:, word] for word in range(_NAME_WORDS))
    return functools.reduce(np.bitwise_or, words)


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
