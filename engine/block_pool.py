"""The books of KV blocks: references, free blocks, quarantine, and who waits for memory.

Owns counts only, never memory or tensors. All calls are made on the event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterable


class PoolExhausted(RuntimeError):
    """Fewer blocks are free than were asked for."""


class BlockPool:
    """num_blocks blocks of block_tokens tokens, each free, referenced, or in quarantine.

    A block is reusable once it has neither references nor quarantines. Quarantine is counted apart
    from references: a late transfer may still write a block that its owner has given back.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"num_blocks {num_blocks} and block_tokens {block_tokens}: minimum 1")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._refs = [0] * num_blocks
        self._quarantines: dict[int, int] = {}
        # Taken from the end: neighbours leave in ascending order and make one transfer descriptor.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def num_quarantined(self) -> int:
        """Blocks that a late transfer may still touch, referenced or not."""
        return len(self._quarantines)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that num_tokens tokens need."""
        return -(-num_tokens // self.block_tokens)

    def num_refs(self, block: int) -> int:
        """References to one block."""
        return self._refs[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes num_blocks free blocks with one reference each; raises PoolExhausted."""
        if num_blocks < 0:
            raise ValueError(f"num_blocks {num_blocks}: minimum 0")
        if num_blocks > len(self._free):
            raise PoolExhausted(
                f"{num_blocks} blocks asked for, {len(self._free)} of {self.num_blocks} free"
            )
        if num_blocks == 0:
            return []
        blocks = self._free[-num_blocks:][::-1]
        del self._free[-num_blocks:]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each block; raises ValueError for one without any."""
        block_ids = list(block_ids)
        self._require_refs(block_ids)
        for block in block_ids:
            self._refs[block] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Gives one reference to each block back; raises ValueError for one without any."""
        refs = self._refs
        # Backwards, so that a run of neighbours is handed out in ascending order again.
        for block in reversed(list(block_ids)):
            self._require_refs((block,))
            refs[block] -= 1
            if refs[block] == 0 and block not in self._quarantines:
                self._free.append(block)

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """Bars referenced blocks from reuse until unquarantine, whatever happens to references."""
        block_ids = list(block_ids)
        self._require_refs(block_ids)
        for block in block_ids:
            self._quarantines[block] = self._quarantines.get(block, 0) + 1

    def unquarantine(self, block_ids: Iterable[int]) -> None:
        """Undoes one quarantine of each block; raises ValueError for one not in quarantine."""
        for block in block_ids:
            if block not in self._quarantines:
                raise ValueError(f"block {block} is not in quarantine")
            self._quarantines[block] -= 1
            if self._quarantines[block] == 0:
                del self._quarantines[block]
                if self._refs[block] == 0:
                    self._free.append(block)

    def check(self) -> None:
        """Asserts that every block is in exactly the state its counts say."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert all(count > 0 for count in self._quarantines.values()), "empty quarantine"
        for block, refs in enumerate(self._refs):
            assert refs >= 0, f"block {block} has {refs} references"
            unused = refs == 0 and block not in self._quarantines
            assert (block in free) == unused, f"block {block}: {refs} references, books differ"

    def _require_refs(self, block_ids: Iterable[int]) -> None:
        for block in block_ids:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"block {block}: the pool has blocks 0 to {self.num_blocks - 1}")
            if self._refs[block] == 0:
                raise ValueError(f"block {block} has no reference")


class BlockWaiters:
    """Callers that wait for blocks, first come first served within a priority (higher first).

    The head waits until it fits and holds up everyone behind it, so large wishes do not starve.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._tickets = itertools.count()
        self._heap: list[tuple[int, int, int, asyncio.Future[list[int]]]] = []

    def __len__(self) -> int:
        return sum(not future.done() for *_, future in self._heap)

    def push(self, num_blocks: int, priority: int) -> asyncio.Future[list[int]]:
        """Queues a wish for num_blocks blocks; the future's result is the allocation."""
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, (-priority, next(self._tickets), num_blocks, future))
        return future

    def serve(self, num_spare: Callable[[int], int]) -> None:
        """Serves heads while their wish is within num_spare(priority) blocks."""
        while self._heap:
            negated, _, num_blocks, future = self._heap[0]
            if not future.done():
                if num_blocks > num_spare(-negated):
                    return
                future.set_result(self._pool.allocate(num_blocks))
            heapq.heappop(self._heap)

    def withdraw(self, wish: asyncio.Future[list[int]]) -> None:
        """Ends one wish; blocks that came for it in the meantime are freed."""
        if not wish.done():
            wish.cancel()
        elif not wish.cancelled() and wish.exception() is None:
            self._pool.free(wish.result())

    def refuse_all(self, error: Exception) -> None:
        """Ends every wait with error."""
        for *_, future in self._heap:
            if not future.done():
                future.set_exception(error)
        self._heap.clear()
