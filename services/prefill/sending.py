"""A prompt's way into the store: slots while it is computed, blocks as they fill, the tail last.

Owns the publishes of one prompt and their tasks: WRITE as soon as KV is there, Seal once its step
went well. Never computes, never decides what is handed off.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine, Sequence

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
        self._tasks: set[asyncio.Task[bool]] = set()
        self._last: asyncio.Task[bool] | None = None
        self._last_tail: asyncio.Task[bool] | None = None
        self._is_good: asyncio.Future[bool] | None = None  # of what was sent since `seal`
        self._is_tail_wanted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._context = contextvars.copy_context()  # of the call: whose trace this belongs to

    def send(self, first: int, block_ids: Sequence[int]) -> None:
        """Sends blocks behind those before; block_ids hold the prompt's blocks from `first` on.

        They are not sealed before `seal`.
        """
        self._is_good = self._is_good or asyncio.get_running_loop().create_future()
        self._last = self._begin(self._send(self._last, first, list(block_ids), self._is_good))

    def seal(self) -> None:
        """What was sent came of steps that went well."""
        if self._is_good is not None:
            self._is_good.set_result(True)
            self._is_good = None

    def send_tail(self, block: int, num_tokens: int) -> None:
        """Sends the tail, num_tokens tokens, if that was not done; sealed by `finish` only."""
        if self._has_tail_key and self._last_tail is None:
            worker = self._worker
            worker.pool.share([block])  # no other owner's KV is cleared, however late that is
            clear = worker.on_settled(worker.runner.cache.zero_block_tail, block, num_tokens)
            cleared = asyncio.ensure_future(clear)
            cleared.add_done_callback(lambda _: worker.release([block]))
            self._last_tail = self._begin(self._send_tail(block, cleared))

    async def reserved(self) -> None:
        """Waits until the slots are reserved: from then on a reader can wait for what is sent."""
        await asyncio.shield(self._reserved)

    async def finish(self, *, wants_tail: bool) -> None:
        """Waits until what was sent is sealed, the tail only if it is wanted."""
        self._is_tail_wanted.set_result(wants_tail)
        await each([_over(self._last), _over(self._last_tail)])

    def drop(self) -> None:
        """Nothing more is sealed: from now on the blocks may be another's."""
        # Each, not the last alone: before its first turn a task does not cancel what it awaits.
        for task in self._tasks:
            task.cancel()

    def close(self) -> None:
        """Drops what is under way and gives unused slots back."""
        self._reserved.cancel()
        self.drop()
        self._blocks.close()
        self._tail.close()

    def _begin(self, sending: Coroutine[None, None, bool]) -> asyncio.Task[bool]:
        task = asyncio.get_running_loop().create_task(sending, context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _reserve(self) -> None:
        deadline = Deadline(PUBLISH_DEADLINE_S)
        await each([self._blocks.reserve(deadline), self._tail.reserve(deadline)])

    async def _send(
        self,
        before: asyncio.Task[bool] | None,
        first: int,
        block_ids: list[int],
        is_good: asyncio.Future[bool],
    ) -> bool:
        """Whether all up to here are sealed: nothing goes out behind a gap."""
        if before is not None and not await before:
            return False
        await self.reserved()
        num_sealed = await self._blocks.send(
            first - self._num_pulled, block_ids, Deadline(PUBLISH_DEADLINE_S), is_good
        )
        return num_sealed == len(block_ids)

    async def _send_tail(self, block: int, cleared: asyncio.Future[None]) -> bool:
        await asyncio.shield(cleared)  # a thread goes on when this is cancelled
        await self.reserved()
        deadline = Deadline(PUBLISH_DEADLINE_S)
        return await self._tail.send(0, [block], deadline, self._is_tail_wanted) == 1


async def _over(task: asyncio.Task[bool] | None) -> None:
    if task is not None:
        await task
