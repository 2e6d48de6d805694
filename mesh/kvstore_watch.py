"""What a store has, followed from afar through its Watch stream.

Owns the set of keys known of one store and the stream that keeps it so. Never asks for blocks. The
keys are a hint: between two messages, and while the store is away, they are those of a moment ago.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import grpc

from mesh.errors import from_rpc_error
from protos import kvstore_pb2, kvstore_pb2_grpc

log = logging.getLogger("kvmesh.kvstore")

_FIRST_BACK_OFF_S, _LAST_BACK_OFF_S = 0.2, 5.0


class Gap(Exception):
    """A message does not follow the one before: everything must be told anew."""


class KnownKeys:
    """The keys of one store, with the tier of each. `apply` every message of its streams in order.

    `is_current`: the keys are exactly what the store had before next_sequence. A snapshot takes the
    place of the old keys when it is whole.
    """

    def __init__(self) -> None:
        self.life = ""
        self.next_sequence = 0
        self.is_current = False
        self._tiers: dict[bytes, kvstore_pb2.Tier] = {}
        self._fresh: dict[bytes, kvstore_pb2.Tier] | None = None  # since a RESET

    def __len__(self) -> int:
        return len(self._tiers)

    def __contains__(self, key: object) -> bool:
        return key in self._tiers

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._tiers)

    def tier_of(self, key: bytes) -> kvstore_pb2.Tier:
        """Where a block is; TIER_UNSPECIFIED: not in this store."""
        return self._tiers.get(key, kvstore_pb2.TIER_UNSPECIFIED)

    def begin(self) -> kvstore_pb2.WatchRequest:
        """The request for the next stream; it goes on where the last one broke, if that may be."""
        self.is_current = False
        if self._fresh is not None:  # half a snapshot is of no use
            self.lose()
        return kvstore_pb2.WatchRequest(life=self.life, from_sequence=self.next_sequence)

    def lose(self) -> None:
        """Has everything told anew by the next stream; the keys stay until then."""
        self.life, self.next_sequence, self.is_current, self._fresh = "", 0, False, None

    def apply(self, message: kvstore_pb2.WatchResponse) -> None:
        """Takes a message in; Gap when it cannot follow."""
        kinds = kvstore_pb2.WatchResponse
        if message.kind == kinds.KIND_RESET:
            self.life, self.next_sequence = message.life, message.next_sequence
            self.is_current, self._fresh = False, {}
            return
        if message.life != self.life:
            raise Gap(f"life {message.life!r} speaks in a stream of {self.life!r}")
        for change in message.changes:
            self._change(change)
        if self.next_sequence != message.next_sequence:
            raise Gap(f"next is {message.next_sequence}; expected {self.next_sequence}")
        if message.kind == kinds.KIND_CURRENT:
            self.is_current = True
            if self._fresh is not None:
                self._tiers, self._fresh = self._fresh, None

    def _change(self, change: kvstore_pb2.Change) -> None:
        tiers = self._tiers if self._fresh is None else self._fresh
        if change.sequence:
            if change.sequence != self.next_sequence:
                raise Gap(f"change {change.sequence}; expected {self.next_sequence}")
            self.next_sequence += len(change.keys)
        if change.kind == kvstore_pb2.Change.KIND_EVICTED:
            for key in change.keys:
                tiers.pop(key, None)
        else:
            tiers.update(dict.fromkeys(change.keys, change.tier))


class StoreWatch:
    """Follows one store. Run `run` as a task; cancel it to end. The channel is the caller's."""

    def __init__(self, *, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.known = KnownKeys()
        self._stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Watches for ever, again after each loss; the back-off grows while nothing is told."""
        back_off_s = _FIRST_BACK_OFF_S
        while True:
            call = self._stub.Watch(self.known.begin())
            try:
                async for message in call:
                    self.known.apply(message)
                    back_off_s = _FIRST_BACK_OFF_S
                    self._tell()
                reason = "the stream ended"
            except grpc.aio.AioRpcError as failure:
                reason = str(from_rpc_error(failure))
            except Gap as gap:
                reason = str(gap)
                self.known.lose()
            finally:
                call.cancel()
                self.known.is_current = False
                self._tell()
            log.info("kvstore %s: not watched now: %s", self.address, reason)
            await asyncio.sleep(back_off_s)
            back_off_s = min(_LAST_BACK_OFF_S, 2 * back_off_s)

    async def changed(self) -> None:
        """Waits for the next message, or the loss of the stream."""
        await self._changed.wait()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
