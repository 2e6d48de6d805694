"""A prompt's way into the store: slots while it is computed, blocks as they fill, the tail last.

Owns the publishes of one prompt and their tasks. Never computes, never decides what is handed off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mesh.kvstore_client import Deadline
from mesh.kvstore_shards import each
from services.worker import PUBLISH_DEADLINE_S, Worker


class Sending:
    """Sends the blocks from num_pulled on, and the private tail under tail_key if there is one.

    Asks for all slots at once, when it is made: nobody waits for them at the end. All are the
    tenant's.
    """

    def __init__(
        self, worker: Worker, keys: list[bytes], num_pulled: int, tail_key: bytes, tenant: str
    ) -> None:
        self._worker = worker
        self._num_pulled = num_pulled
        self._blocks = worker.store.publish(keys[num_pulled:], tenant=tenant)
        tail_keys = [tail_key] if tail_key else []
        self._tail = worker.store.publish(tail_keys, is_private=True, tenant=tenant)
        self._has_tail_key = bool(tail_key)
        self._reserved = asyncio.ensure_future(self._reserve())
        self._last: asyncio.Task[bool] | None = None

    def send(self, first: int, block_ids: Sequence[int]) -> None:
        """Sends blocks behind those before; block_ids hold the prompt's blocks from `first` on."""
        self._last = asyncio.ensure_future(self._send(self._last, first, list(block_ids)))

    async def reserved(self) -> None:
        """Waits until the slots are reserved: from then on a reader can wait for what is sent."""
        await asyncio.shield(self._reserved)

    async def finish(self, tail_block: int | None, tail_len: int) -> None:
        """Sends the tail, tail_len tokens, and waits until it and what was sent are sealed."""
        tail = [] if tail_block is None else [self._send_tail(tail_block, tail_len)]
        await each([self._sent(), *tail])

    def close(self) -> None:
        """Drops what is under way and gives unused slots back."""
        self._reserved.cancel()
        if self._last is not None:
            self._last.cancel()
        self._blocks.close()
        self._tail.close()

    async def _reserve(self) -> None:
        deadline = Deadline(PUBLISH_DEADLINE_S)
        await each([self._blocks.reserve(deadline), self._tail.reserve(deadline)])

    async def _send(
        self, before: asyncio.Task[bool] | None, first: int, block_ids: list[int]
    ) -> bool:
        """Whether all up to here are sealed: nothing goes out behind a gap."""
        if before is not None and not await before:
            return False
        await self.reserved()
        num_sealed = await self._blocks.send(
            first - self._num_pulled, block_ids, Deadline(PUBLISH_DEADLINE_S)
        )
        return num_sealed == len(block_ids)

    async def _sent(self) -> None:
        if self._last is not None:
            await self._last

    async def _send_tail(self, block: int, num_tokens: int) -> None:
        if not self._has_tail_key:
            return
        cache = self._worker.runner.cache
        await self._worker.on_settled(cache.zero_block_tail, block, num_tokens)
        await self.reserved()
        await self._tail.send(0, [block], Deadline(PUBLISH_DEADLINE_S))
