"""What a worker holds at stores and will not use: told to each store until it has answered.

Owns one queue a store, with one task while there is something in it; the store's connection is in
use as long. It ends with the store's answer (another life answers that it knows of nothing), with
the promises' own time, or when the store has left and cannot be told.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator
from itertools import islice

from mesh.errors import KvmeshError
from mesh.kvstore_background import Background
from mesh.kvstore_shard import (
    FIRST_BACK_OFF_S,
    LAST_BACK_OFF_S,
    MAX_KEYS,
    RPC_TIMEOUT_S,
    Shard,
)
from protos import kvstore_pb2


class GiveBack:
    """The queues of all stores. `within_s`: seconds after which a promise has ended by itself."""

    def __init__(self, *, incarnation: str, background: Background) -> None:
        self._incarnation = incarnation
        self._background = background
        self._queues: dict[Shard, tuple[_Queue, asyncio.Task[None]]] = {}

    @contextlib.contextmanager
    def unless_answered(self, shard: Shard, within_s: float) -> Iterator[int]:
        """For one Reserve or Lookup, under the attempt given: gives back what it may have got, or
        may yet get, when it ends with an error or is cancelled.
        """
        attempt = secrets.randbits(63) + 1
        try:
            yield attempt
        except BaseException:
            self.attempt(shard, attempt, within_s)
            raise

    def attempt(self, shard: Shard, attempt: int, within_s: float) -> None:
        """Gives back all that a Reserve or a Lookup got."""
        queue, _ = self._queue_of(shard)
        queue.attempts[attempt] = time.monotonic() + within_s

    def slots(
        self, shard: Shard, life: str, reservation_ids: Iterable[int], within_s: float
    ) -> asyncio.Task[None]:
        """Gives back slots of a life of the store that nothing is written to any more.

        Returns the queue's task, which ends when the store has been told of all that is queued.
        """
        queue, task = self._queue_of(shard)
        until = dict.fromkeys(reservation_ids, time.monotonic() + within_s)
        queue.reservations.setdefault(life, {}).update(until)
        return task

    def _queue_of(self, shard: Shard) -> tuple[_Queue, asyncio.Task[None]]:
        if shard not in self._queues:
            queue = _Queue(shard, self._incarnation)
            shard.uses.add()
            self._queues[shard] = queue, self._background.spawn(self._run(shard, queue))
        return self._queues[shard]

    async def _run(self, shard: Shard, queue: _Queue) -> None:
        try:
            await queue.run()
        finally:
            del self._queues[shard]
            shard.uses.drop()


class _Queue:
    """What one store is to be told, and until when on the monotonic clock."""

    def __init__(self, shard: Shard, incarnation: str) -> None:
        self._shard = shard
        self._incarnation = incarnation
        self.reservations: dict[str, dict[int, float]] = {}  # ids of a life, by life
        self.attempts: dict[int, float] = {}

    async def run(self) -> None:
        """Returns when nothing is queued."""
        back_off_s = FIRST_BACK_OFF_S
        while self.reservations or self.attempts:
            try:
                await self._tell()
                back_off_s = FIRST_BACK_OFF_S
            except KvmeshError:
                if self._shard.has_left:
                    return
                await asyncio.sleep(back_off_s)
                back_off_s = min(LAST_BACK_OFF_S, 2 * back_off_s)
                self._expire()

    async def _tell(self) -> None:
        """One call; what it names is forgotten when the store has answered."""
        life = next(iter(self.reservations), "")
        reservation_ids = list(islice(self.reservations.get(life, ()), MAX_KEYS))
        attempts = list(islice(self.attempts, MAX_KEYS))
        request = kvstore_pb2.AcknowledgeRequest(
            incarnation=self._incarnation,
            reservation_ids=reservation_ids,
            life=life,
            attempts=attempts,
        )
        await self._shard.call("Acknowledge", request, RPC_TIMEOUT_S, even_down=True)
        for attempt in attempts:
            del self.attempts[attempt]
        for number in reservation_ids:
            del self.reservations[life][number]
        if life and not self.reservations[life]:
            del self.reservations[life]

    def _expire(self) -> None:
        """Forgets what has ended at the store by itself."""
        now = time.monotonic()
        self.attempts = {n: until for n, until in self.attempts.items() if until > now}
        for life, ids in list(self.reservations.items()):
            self.reservations[life] = {n: until for n, until in ids.items() if until > now}
            if not self.reservations[life]:
                del self.reservations[life]
