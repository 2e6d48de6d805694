"""What one pull or publish needs of the stores: the live shards, work that goes on, a deadline.

Owns who is asked for which keys. Never asks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mesh.kvstore_background import Background
from mesh.kvstore_giveback import GiveBack
from mesh.kvstore_shard import Shard, ShardState
from mesh.rendezvous import owner
from mesh.telemetry import Telemetry

_MIN_TTL_S, _MAX_TTL_S, _TTL_SLACK_S = 30.0, 300.0, 5.0


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
    give_back: GiveBack

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
