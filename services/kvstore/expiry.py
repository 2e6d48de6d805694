"""Deadlines of reservations, leases, pins, quarantined slots and private blocks.

Owns the order in which things fall due; never acts on them and reads no clock.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterator

_SLACK = 1024


class Due(enum.IntEnum):
    """What falls due."""

    RESERVATION = 1
    LEASE = 2
    QUARANTINE = 3
    PRIVATE = 4
    PIN = 5


class Deadlines:
    """At most one deadline for each (kind, id)."""

    def __init__(self) -> None:
        self._live: dict[tuple[Due, int], float] = {}
        self._heap: list[tuple[float, Due, int]] = []
        self.num_due = dict.fromkeys(Due, 0)  # that fell due so far

    def set(self, kind: Due, number: int, deadline: float) -> None:
        """Sets a deadline, clock seconds."""
        self._live[kind, number] = deadline
        heapq.heappush(self._heap, (deadline, kind, number))
        if len(self._heap) > 2 * len(self._live) + _SLACK:
            self._heap = [(at, kind, number) for (kind, number), at in self._live.items()]
            heapq.heapify(self._heap)

    def cancel(self, kind: Due, number: int) -> None:
        """Forgets a deadline; unknown ones are ignored."""
        self._live.pop((kind, number), None)

    def pop_due(self, now: float) -> Iterator[tuple[Due, int]]:
        """Takes out, earliest first, everything with a deadline at or before now."""
        while self._heap and self._heap[0][0] <= now:
            deadline, kind, number = heapq.heappop(self._heap)
            if self._live.get((kind, number)) == deadline:
                del self._live[kind, number]
                self.num_due[kind] += 1
                yield kind, number

    def live(self, kind: Due) -> set[int]:
        """Ids of one kind that have a deadline."""
        return {number for due, number in self._live if due is kind}
