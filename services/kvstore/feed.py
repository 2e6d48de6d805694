"""What one watcher is told: a snapshot of the store where it needs one, then every change.

Owns a watcher's position. Pure: it waits for nobody and keeps nothing but numbers, so that the
journal's ring bounds how far a watcher may be behind. The snapshot is made piece by piece while the
store goes on; the changes since its beginning follow it, and make it exact.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from services.kvstore.block import Place
from services.kvstore.blocks import Blocks

MAX_KEYS = 4096  # of one message


class NewsKind(enum.Enum):
    """What a message of a feed is; kvstore.proto tells more."""

    RESET = enum.auto()
    SNAPSHOT = enum.auto()
    CHANGES = enum.auto()
    CURRENT = enum.auto()


class ChangeKind(enum.Enum):
    """What happened to a key."""

    SEALED = enum.auto()
    EVICTED = enum.auto()
    MOVED = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The same change of several keys; their numbers are sequence, sequence + 1, ..."""

    kind: ChangeKind
    place: Place  # now; when evicted: before
    keys: list[bytes]
    sequence: int = 0  # 0 in a snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """One message."""

    kind: NewsKind
    next_sequence: int
    changes: tuple[Change, ...] = ()


class Feed:
    """`next` until there is nothing; then wait for the journal. from_sequence 0 knows nothing."""

    def __init__(self, blocks: Blocks, from_sequence: int, max_keys: int = MAX_KEYS) -> None:
        self._blocks = blocks
        self._journal = blocks.journal
        self._max_keys = max_keys
        self._position = from_sequence  # the change to tell next
        self._row: int | None = None  # the snapshot's next row; None: no snapshot under way
        self._exact_at = 0  # a watcher that was told all changes before it is current
        self._is_current = False
        if from_sequence > self._journal.next_sequence:
            self._position = 0  # of another life

    def next(self) -> News | None:
        """The next message; None when the watcher knows all."""
        if self._position < self._journal.first_sequence:
            self._row, self._is_current = 0, False
            self._position = self._journal.next_sequence
            return self._news(NewsKind.RESET)
        while self._row is not None:
            if changes := self._next_rows():
                return self._news(NewsKind.SNAPSHOT, *changes)
        if not self._is_current and self._position >= self._exact_at:
            self._is_current = True
            return self._news(NewsKind.CURRENT)
        if self._position < self._journal.next_sequence:
            changes = tuple(self._next_changes())
            self._position += sum(len(change.keys) for change in changes)
            return self._news(NewsKind.CHANGES, *changes)
        return None

    def _news(self, kind: NewsKind, *changes: Change) -> News:
        return News(kind=kind, next_sequence=self._position, changes=changes)

    def _next_rows(self) -> list[Change]:
        """The snapshot's next piece; empty where the table has none there, and at its end."""
        assert self._row is not None
        first, blocks = self._row, self._blocks
        if first >= blocks.end:
            self._row, self._exact_at = None, self._journal.next_sequence
            return []
        self._row = first + self._max_keys
        places = blocks.place.values[first : self._row]
        found = ((place, np.flatnonzero(places == place) + first) for place in Place if place)
        return [
            Change(kind=ChangeKind.SEALED, place=place, keys=blocks.names_of(rows))
            for place, rows in found
            if len(rows)
        ]

    def _next_changes(self) -> Iterator[Change]:
        keys, before, after = self._journal.read(self._position, self._max_keys)
        is_other = (np.diff(before) != 0) | (np.diff(after) != 0)
        starts = [0, *(np.flatnonzero(is_other) + 1).tolist(), len(keys)]
        for start, end in itertools.pairwise(starts):
            kind, place = _kind(Place(int(before[start])), Place(int(after[start])))
            yield Change(
                kind=kind, place=place, keys=keys[start:end], sequence=self._position + start
            )


def _kind(before: Place, after: Place) -> tuple[ChangeKind, Place]:
    if after is Place.NONE:
        return ChangeKind.EVICTED, before
    return ChangeKind.SEALED if before is Place.NONE else ChangeKind.MOVED, after
