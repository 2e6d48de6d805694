"""Lookups of blocks that are still being written.

Owns who waits for which reservation. Never decides what is found: a Lookup looks again afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.kvstore.index import BlockIndex


class Waiting:
    """Waits of an index's readers; each ends when the reservation does, or at its own limit."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index
        self._waits: dict[int, set[asyncio.Future[None]]] = {}
        index.on_settled = self._settle

    async def until_written(self, keys: Sequence[bytes], max_wait_s: float) -> float:
        """Waits until no leading block of the keys is reserved; seconds of max_wait_s left."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max_wait_s
        while number := self._index.first_reserved(keys):
            settled = loop.create_future()
            waits = self._waits.setdefault(number, set())
            waits.add(settled)
            try:
                async with asyncio.timeout_at(deadline):
                    await settled
            except TimeoutError:
                return 0.0
            finally:
                waits.discard(settled)
        return max(0.0, deadline - loop.time())

    def _settle(self, number: int) -> None:
        for settled in self._waits.pop(number, ()):
            if not settled.done():  # its Lookup may have been cancelled just now
                settled.set_result(None)
