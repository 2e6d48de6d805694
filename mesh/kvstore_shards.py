"""What one pull or publish needs of the stores: the live shards, background work, a deadline.

Owns the tasks that must outlive a cancelled caller (a lease is given back even so). Never raises a
store's trouble; it is counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kv.errors import TransferError
from mesh.errors import KvmeshError
from mesh.kvstore_shard import RPC_TIMEOUT_S, Shard, ShardState
from mesh.rendezvous import owner
from mesh.telemetry import Telemetry
from protos import kvstore_pb2

log = logging.getLogger("kvmesh.kvstore")

MAX_KEYS = 4096
TROUBLE = (KvmeshError, TransferError)
_RETRY_S = 0.5
_MIN_TTL_S, _MAX_TTL_S, _TTL_SLACK_S = 30.0, 300.0, 5.0

T = TypeVar("T")


class Background:
    """Tasks that belong to the client, not to a request."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs a coroutine to its end, whatever happens to the caller."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def keep(
        self, coroutine: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, object]]
    ) -> T:
        """Awaits a coroutine that goes on when the caller is cancelled, then to be undone."""
        task = self.spawn(coroutine)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                self.spawn(self._undo(task, undo))
            raise

    async def close(self, timeout_s: float) -> None:
        """Waits for what runs, then cancels the rest."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)
        rest = list(self._tasks)
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)

    async def _undo(
        self, task: asyncio.Task[T], undo: Callable[[T], Coroutine[Any, Any, object]]
    ) -> None:
        try:
            result = await task
        except TROUBLE:
            return
        await undo(result)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, TROUBLE):
            log.error("background work failed", exc_info=error)


class Deadline:
    """A point in time on the monotonic clock."""

    def __init__(self, deadline_s: float) -> None:
        self._at = time.monotonic() + deadline_s
        self.ttl_s = min(_MAX_TTL_S, max(_MIN_TTL_S, deadline_s + _TTL_SLACK_S))

    @property
    def remaining_s(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._at - time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The stores and what moves with every request to them."""

    shards: Mapping[str, Shard]  # by address, as they are now
    block_num_bytes: int
    incarnation: str
    digest: Callable[[list[int]], Awaitable[list[int]]]
    telemetry: Telemetry
    background: Background

    def assign(self, keys: Sequence[bytes]) -> list[tuple[Shard, list[int]]]:
        """Which live shard owns which keys: (shard, indices of keys in order). Empty: none up."""
        live = {a: shard for a, shard in self.shards.items() if shard.state is ShardState.UP}
        if not live:
            return []
        members = sorted(live)
        indices: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            indices.setdefault(owner(key, members), []).append(index)
        return [(live[address], of_shard) for address, of_shard in indices.items()]

    def fits(self, shard: Shard, offset: int, num_bytes: int) -> bool:
        """Whether a slot is one block inside the store's arena."""
        room = shard.arena_num_bytes - self.block_num_bytes
        return num_bytes == self.block_num_bytes and offset <= room

    async def take_back(self, shard: Shard, attempt: int, within_s: float) -> None:
        """Gives back what a Reserve without an answer may have got, once the store can be told.

        After within_s seconds its slots end by themselves.
        """
        request = kvstore_pb2.AcknowledgeRequest(incarnation=self.incarnation, attempt=attempt)
        deadline = Deadline(within_s)
        while deadline.remaining_s and not shard.has_left:
            try:
                await shard.call("Acknowledge", request, RPC_TIMEOUT_S, even_down=True)
                return
            except TROUBLE:
                await asyncio.sleep(_RETRY_S)

    def count_moved(self, direction: str, num_blocks: int, duration_s: float) -> None:
        """Records one transfer that went well; direction is get or put, whoever moved."""
        instruments, attributes = self.telemetry.instruments, {"direction": direction}
        instruments.kv_transfer_duration.record(duration_s, attributes)
        instruments.kv_transfer_io.add(num_blocks * self.block_num_bytes, attributes)


async def each(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs all side by side; on a failure or cancellation the others end first, then it raises."""
    everything = list(coroutines)
    if len(everything) == 1:
        await everything[0]
        return
    try:
        async with asyncio.TaskGroup() as tasks:
            for coroutine in everything:
                tasks.create_task(coroutine)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
