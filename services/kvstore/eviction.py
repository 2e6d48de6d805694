"""Which block goes next: least recently used, unleased, leaves before parents.

Owns the order of use and the parent relation; the index, told through a callback, drops the blocks.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping

from services.kvstore.arena import SlotAllocator
from services.kvstore.block import Block, BlockState

_SLACK = 1024


class LruLeaves:
    """Eviction order over the index's blocks.

    A parent edge is recorded only from a new block that nobody names as parent to a present one, so
    edges never form a cycle and every unpinned block is reached.
    """

    def __init__(self, blocks: Mapping[bytes, Block], slots: SlotAllocator) -> None:
        self._blocks = blocks
        self._slots = slots
        self._num_children: dict[bytes, int] = {}  # by parent key, present or not
        self._heap: list[tuple[int, int, Block]] = []  # (last_used, push, block), stale ones too
        self._uses = itertools.count(1)
        self._pushes = itertools.count()

    def add(self, block: Block, parent: bytes | None) -> None:
        """Takes a new block; `parent` is the key before it in its chain."""
        self.touch(block)
        if parent is None or parent == block.key or block.key in self._num_children:
            return
        if parent in self._blocks:
            block.parent = parent
            self._num_children[parent] = self._num_children.get(parent, 0) + 1

    def remove(self, block: Block) -> None:
        """Forgets a block that left the index; its parent may become a leaf."""
        if block.parent is None:
            return
        left = self._num_children[block.parent] - 1
        if left:
            self._num_children[block.parent] = left
            return
        del self._num_children[block.parent]
        if parent := self._blocks.get(block.parent):
            self.offer(parent)

    def touch(self, block: Block) -> None:
        """Marks a block as the most recently used."""
        block.last_used = next(self._uses)
        self.offer(block)

    def offer(self, block: Block) -> None:
        """Lists the block for eviction if nothing holds it."""
        if not self.is_candidate(block):
            return
        heapq.heappush(self._heap, (block.last_used, next(self._pushes), block))
        if len(self._heap) > 2 * len(self._blocks) + _SLACK:
            candidates = filter(self.is_candidate, self._blocks.values())
            self._heap = [(b.last_used, next(self._pushes), b) for b in candidates]
            heapq.heapify(self._heap)

    def peek(self) -> Block | None:
        """The next victim; None when nothing is evictable."""
        while self._heap:
            last_used, _, block = self._heap[0]
            if block.last_used == last_used and self.is_candidate(block):
                return block
            heapq.heappop(self._heap)
        return None

    def make_room(self, num_bytes: int, drop: Callable[[Block], None]) -> int | None:
        """Offset of a new slot, dropping victims as needed; drops none where none would help."""
        checked = False
        while (offset := self._slots.allocate(num_bytes)) is None:
            victim = self.peek()
            if victim is None:
                return None
            if not checked and victim.num_bytes != num_bytes:
                unpinned = {b.offset for b in self._blocks.values() if is_unpinned(b)}
                if not self._slots.could_fit(num_bytes, unpinned.__contains__):
                    return None
                checked = True
            drop(victim)
        return offset

    def is_candidate(self, block: Block) -> bool:
        """Sealed, unleased, not private, and no present block has it as parent."""
        return is_unpinned(block) and block.key not in self._num_children

    def check(self) -> None:
        """Asserts that child counts are right and that every candidate is listed."""
        num_children: dict[bytes, int] = {}
        for block in self._blocks.values():
            if block.parent is not None:
                num_children[block.parent] = num_children.get(block.parent, 0) + 1
        assert num_children == self._num_children, "child counts differ from the blocks"
        listed = {(last_used, id(block)) for last_used, _, block in self._heap}
        for block in self._blocks.values():
            if self.is_candidate(block):
                assert (block.last_used, id(block)) in listed, "an evictable block is not listed"


def is_unpinned(block: Block) -> bool:
    """Whether only descendants may keep the block from eviction."""
    return block.state is BlockState.SEALED and not block.is_private and not block.num_leases
