"""KvStoreService.Watch: the streams of all watchers.

Owns how many there are, when they wake and when they end. What a watcher is told is its feed's, and
the journal bounds how far it may be behind: the store waits for none of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from mesh.errors import ResourceExhausted, Unavailable
from protos import kvstore_pb2
from services.kvstore.block import Place
from services.kvstore.feed import Change, ChangeKind, Feed, News, NewsKind
from services.kvstore.index import BlockIndex

MAX_WATCHERS = 64
_PACE_S = 0.02  # changes within it go out together

_KINDS = {
    NewsKind.RESET: kvstore_pb2.WatchResponse.KIND_RESET,
    NewsKind.SNAPSHOT: kvstore_pb2.WatchResponse.KIND_SNAPSHOT,
    NewsKind.CHANGES: kvstore_pb2.WatchResponse.KIND_CHANGES,
    NewsKind.CURRENT: kvstore_pb2.WatchResponse.KIND_CURRENT,
}
_CHANGES = {
    ChangeKind.SEALED: kvstore_pb2.Change.KIND_SEALED,
    ChangeKind.EVICTED: kvstore_pb2.Change.KIND_EVICTED,
    ChangeKind.MOVED: kvstore_pb2.Change.KIND_MOVED,
}
_TIERS = {
    Place.MEMORY: kvstore_pb2.TIER_MEMORY,
    Place.HOST: kvstore_pb2.TIER_HOST,
    Place.DISK: kvstore_pb2.TIER_DISK,
}


class Watchers:
    """Streams over one index of the store that `life` names. `close` ends them, for good."""

    def __init__(self, *, index: BlockIndex, life: str, limit: int = MAX_WATCHERS) -> None:
        self._index = index
        self._life = life
        self._limit = limit
        self._alarms: set[asyncio.Event] = set()  # one a watcher
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._alarms)

    async def stream(
        self, request: kvstore_pb2.WatchRequest
    ) -> AsyncIterator[kvstore_pb2.WatchResponse]:
        """Everything that a watcher must know, and then what happens. Ends by an error only."""
        if len(self._alarms) >= self._limit:
            raise ResourceExhausted(
                f"{len(self._alarms)} watchers; this store takes {self._limit} (--max-watchers)",
                reason="TOO_MANY_WATCHERS",
                retryable=True,
            )
        is_known = request.life == self._life
        feed = self._index.feed(request.from_sequence if is_known else 0)
        alarm = asyncio.Event()
        self._alarms.add(alarm)
        try:
            while True:
                while (news := self._next(feed)) is not None:
                    yield to_wire(news, self._life)
                await self._wait(alarm)
        finally:
            self._alarms.remove(alarm)
            self._index.journal.sleepers.discard(alarm.set)

    def close(self) -> None:
        """Ends all streams with UNAVAILABLE."""
        self._is_closed = True
        for alarm in self._alarms:
            alarm.set()

    def _next(self, feed: Feed) -> News | None:
        if self._is_closed:
            raise Unavailable("this store is draining", reason="DRAINING", retryable=True)
        return feed.next()

    async def _wait(self, alarm: asyncio.Event) -> None:
        """Until something happens, and a little longer: more may follow."""
        self._index.journal.sleepers.add(alarm.set)
        await alarm.wait()
        if not self._is_closed:
            alarm.clear()
            await asyncio.sleep(_PACE_S)


def to_wire(news: News, life: str) -> kvstore_pb2.WatchResponse:
    """The message that carries news of a life of a store."""
    return kvstore_pb2.WatchResponse(
        kind=_KINDS[news.kind],
        life=life,
        next_sequence=news.next_sequence,
        changes=[_change(change) for change in news.changes],
    )


def _change(change: Change) -> kvstore_pb2.Change:
    return kvstore_pb2.Change(
        sequence=change.sequence,
        kind=_CHANGES[change.kind],
        tier=_TIERS[change.place],
        keys=change.keys,
    )
