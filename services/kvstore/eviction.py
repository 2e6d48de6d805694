"""Which block of a tier goes next: least recently used, nobody's parent there, free to go.

Owns the tier's numbers of children and its order of use; whoever owns the tier drops the blocks.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.kvstore.blocks import Blocks
from services.kvstore.rows import NOBODY, Column, RowArray

_ROW_BITS = 32
_ROW_MASK = 2**_ROW_BITS - 1
_PATIENCE = 1024  # stale entries that `peek` mends one by one before it sorts them all anew


class Tier(Protocol):
    """What eviction must know of a tier."""

    def is_free(self, row: int) -> bool:
        """Whether only its children may keep a block here."""
        ...

    def are_free(self, rows: RowArray) -> NDArray[np.bool_]:
        """The same for many."""
        ...


class _LruQueue:
    """Candidates by when they were last used, as far as the queue knows.

    Each has one entry, mended when it comes up, so that using a block costs nothing here. `listed`
    has the queue's mark where a row is listed in it: queues of which a row is only ever in one may
    share it.
    """

    def __init__(
        self, blocks: Blocks, listed: Column, mark: int, is_candidate: Callable[[int], bool]
    ) -> None:
        self._blocks = blocks
        self._listed = listed
        self.mark = mark
        self._is_candidate = is_candidate
        self._heap: list[int] = []  # last_used << _ROW_BITS | row
        self._max_len = _PATIENCE

    def has(self, row: int) -> bool:
        """Whether a row is listed here."""
        return self._listed.at[row] == self.mark

    def push(self, row: int) -> None:
        """Lists a candidate that is not."""
        self._listed.at[row] = self.mark
        heapq.heappush(self._heap, self._blocks.last_used.at[row] << _ROW_BITS | row)

    def peek(self) -> int:
        """The next victim; NOBODY when nothing may go."""
        heap, listed, last_used = self._heap, self._listed.at, self._blocks.last_used.at
        num_stale = 0
        while heap:
            row = heap[0] & _ROW_MASK
            if listed[row] != self.mark:
                heapq.heappop(heap)
            elif not self._is_candidate(row):
                heapq.heappop(heap)
                listed[row] = 0
            elif last_used[row] == heap[0] >> _ROW_BITS:
                return row
            elif num_stale < _PATIENCE:
                heapq.heapreplace(heap, last_used[row] << _ROW_BITS | row)
            else:
                self._sort()
            num_stale += 1
        return NOBODY

    def prune(self) -> None:
        """Forgets entries of rows that are listed elsewhere now, once these may be half of all."""
        if len(self._heap) > self._max_len:
            rows = np.unique([entry & _ROW_MASK for entry in self._heap])
            rows = rows[self._listed.values[rows] == self.mark]
            uses = self._blocks.last_used.values[rows].tolist()
            pairs = zip(uses, rows.tolist(), strict=True)
            self._heap = sorted(used << _ROW_BITS | row for used, row in pairs)
            self._max_len = 2 * len(self._heap) + _PATIENCE

    def check(self) -> list[int]:
        """The rows listed, after asserting that no entry is newer than its block's last use."""
        for entry in self._heap:
            assert entry >> _ROW_BITS <= self._blocks.last_used.at[entry & _ROW_MASK]
        return [row for entry in self._heap if self.has(row := entry & _ROW_MASK)]

    def _sort(self) -> None:
        """Brings all entries up to date; a sorted list is a heap."""
        rows = np.array([entry & _ROW_MASK for entry in self._heap])
        order = np.argsort(self._blocks.last_used.values[rows])
        uses = self._blocks.last_used.values[rows[order]].tolist()
        pairs = zip(uses, rows[order].tolist(), strict=True)
        self._heap[:] = [used << _ROW_BITS | row for used, row in pairs]


class LruLeaves:
    """Eviction order over the blocks of one tier."""

    def __init__(self, blocks: Blocks, tier: Tier) -> None:
        self._blocks = blocks
        self._tier = tier
        self._num_children = blocks.children()
        self._is_listed = blocks.column(np.bool_)
        self._queue = _LruQueue(blocks, self._is_listed, True, self.is_candidate)

    def enter(self, row: int) -> None:
        """Takes a block into the tier."""
        parent = self._blocks.parent.at[row]
        if parent != NOBODY:
            self._num_children.at[parent] += 1
        self.offer(row)

    def leave(self, row: int) -> None:
        """Forgets a block that leaves the tier; its parent may become a leaf."""
        parent = self._blocks.parent.at[row]
        if parent == NOBODY:
            return
        self._num_children.at[parent] -= 1
        if not self._num_children.at[parent]:
            self.offer(parent)
            self._blocks.let_go(parent)

    def offer(self, row: int) -> None:
        """Lists a block if it is a candidate."""
        if not self._is_listed.at[row] and self.is_candidate(row):
            self._queue.push(row)

    def offer_all(self, rows: RowArray) -> None:
        """Lists those that are candidates."""
        for row in rows[self._are_candidates(rows) & ~self._is_listed.values.take(rows)].tolist():
            self.offer(row)

    def peek(self) -> int:
        """The next victim; NOBODY when nothing may go."""
        return self._queue.peek()

    def is_candidate(self, row: int) -> bool:
        """Whether a block may go now."""
        return not self._num_children.at[row] and self._tier.is_free(row)

    def check(self, members: RowArray) -> None:
        """Asserts that child counts are right and that every candidate is listed, once."""
        num_children = np.bincount(
            self._blocks.parent.values[members], minlength=len(self._num_children.values)
        )
        num_children[NOBODY] = 0
        assert (num_children == self._num_children.values).all(), "child counts are wrong"
        listed = self._queue.check()
        assert sorted(listed) == np.flatnonzero(self._is_listed.values).tolist()
        candidates = members[self._are_candidates(members)]
        assert candidates.tolist() == [r for r in members.tolist() if self.is_candidate(r)]
        assert set(candidates.tolist()) <= set(listed), "an evictable block is not listed"

    def _are_candidates(self, rows: RowArray) -> NDArray[np.bool_]:
        return (self._num_children.values.take(rows) == 0) & self._tier.are_free(rows)


class TenantLeaves(LruLeaves):
    """The same, and an order for each tenant's own blocks."""

    def __init__(self, blocks: Blocks, tier: Tier) -> None:
        super().__init__(blocks, tier)
        self._marks = itertools.count(1)
        self._listed_for = blocks.column(np.int64)  # mark of the queue that has the row
        self._queues: dict[int, _LruQueue] = {}

    def offer(self, row: int) -> None:
        """Lists a block if it is a candidate."""
        if self.is_candidate(row):
            super().offer(row)
            queue = self._queue_of(self._blocks.tenant.at[row])
            if not queue.has(row):
                queue.push(row)
                queue.prune()

    def offer_all(self, rows: RowArray) -> None:
        """Lists those that are candidates."""
        rows = rows[self._are_candidates(rows)]
        tenants = self._blocks.tenant.values.take(rows)
        for tenant in np.unique(tenants).tolist():
            own, mark = rows[tenants == tenant], self._queue_of(tenant).mark
            is_listed = self._is_listed.values.take(own)
            is_listed &= self._listed_for.values.take(own) == mark
            for row in own[~is_listed].tolist():
                self.offer(row)

    def peek_of(self, tenant: int) -> int:
        """A tenant's next victim; NOBODY when nothing of it may go."""
        return self._queues[tenant].peek() if tenant in self._queues else NOBODY

    def forget(self, tenant: int) -> None:
        """Drops the order of a tenant that has no blocks."""
        self._queues.pop(tenant, None)

    def check(self, members: RowArray) -> None:
        """Asserts the same of each tenant's order."""
        super().check(members)
        listed = {tenant: set(queue.check()) for tenant, queue in self._queues.items()}
        for row in members[self._are_candidates(members)].tolist():
            tenant = self._blocks.tenant.at[row]
            assert row in listed[tenant], "an evictable block is not listed for its tenant"

    def _queue_of(self, tenant: int) -> _LruQueue:
        queue = self._queues.get(tenant)
        if queue is None:
            tenants = self._blocks.tenant

            def is_candidate(row: int) -> bool:
                return tenants.at[row] == tenant and self.is_candidate(row)

            # A new mark each time: what was listed in a queue that is gone is listed nowhere.
            queue = _LruQueue(self._blocks, self._listed_for, next(self._marks), is_candidate)
            self._queues[tenant] = queue
        return queue
