"""One publish: Reserve, WRITE, digest, Seal. Owns the reservations, which always end.

Never seals a block whose WRITE did not end well. A reservation whose WRITE is late is acknowledged
when that transfer is over, not before: the store reuses the slot then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh.kvstore_shard import RPC_TIMEOUT_S, Shard
from mesh.kvstore_shards import MAX_KEYS, TROUBLE, Deadline, Shards, each
from protos import kvstore_pb2

_DIGEST_MASK = 2**64 - 1


@dataclass(slots=True, kw_only=True)
class _Grant:
    """Slots that one store reserved; `indices` are positions among the publish's keys."""

    shard: Shard
    num_sealed_before: int = 0
    indices: list[int] = field(default_factory=list)
    reservation_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    is_written: bool = False
    is_closed: bool = False
    late: asyncio.Future[None] | None = None


class Publish:
    """One publish of local blocks `block_ids` under `keys`."""

    def __init__(
        self,
        *,
        shards: Shards,
        keys: Sequence[bytes],
        block_ids: Sequence[int],
        is_private: bool,
        deadline: Deadline,
    ) -> None:
        self._shards = shards
        self._keys = keys
        self._block_ids = block_ids
        self._is_private = is_private
        self._deadline = deadline
        self._grants: list[_Grant] = []
        self._digests: dict[int, int] = {}
        self._num_sealed = 0

    async def run(self) -> int:
        """Returns how many of the keys are sealed in the stores now."""
        try:
            assigned = self._shards.assign(self._keys)
            await each(self._reserve(shard, indices) for shard, indices in assigned)
            if self._grants:
                await each([self._digest(), *(self._write(grant) for grant in self._grants)])
                written = [grant for grant in self._grants if grant.is_written]
                await each(self._seal(grant) for grant in written if self._digests)
            return self._num_sealed
        finally:
            for grant in self._grants:
                if not grant.is_closed:
                    self._shards.background.spawn(self._give_back(grant))

    async def _reserve(self, shard: Shard, indices: list[int]) -> None:
        for first in range(0, len(indices), MAX_KEYS):
            chunk = indices[first : first + MAX_KEYS]
            try:
                grant = await self._shards.background.keep(
                    self._grant(shard, chunk), undo=self._give_back
                )
            except TROUBLE:
                return
            self._num_sealed += grant.num_sealed_before
            if grant.indices:
                self._grants.append(grant)

    async def _grant(self, shard: Shard, indices: list[int]) -> _Grant:
        request = kvstore_pb2.ReserveRequest(
            incarnation=self._shards.incarnation,
            keys=[self._keys[index] for index in indices],
            num_bytes=self._shards.block_num_bytes,
            is_private=self._is_private,
            ttl_s=self._deadline.ttl_s,
        )
        response = await shard.call("Reserve", request, self._deadline.remaining_s)
        grant = _Grant(shard=shard)
        for index, reservation in zip(indices, response.reservations, strict=False):
            if reservation.outcome == kvstore_pb2.Reservation.OUTCOME_ALREADY_SEALED:
                grant.num_sealed_before += 1
            elif reservation.outcome != kvstore_pb2.Reservation.OUTCOME_RESERVED:
                continue
            elif self._shards.fits(shard, reservation.slot):
                grant.indices.append(index)
                grant.reservation_ids.append(reservation.reservation_id)
                grant.offsets.append(reservation.slot.offset)
        return grant

    async def _digest(self) -> None:
        """Digests of what is to be sealed, while it is being written: both only read."""
        indices = [index for grant in self._grants for index in grant.indices]
        try:
            async with asyncio.timeout(self._deadline.remaining_s):
                digests = await self._shards.digest([self._block_ids[index] for index in indices])
        except TimeoutError:
            return
        self._digests = dict(zip(indices, digests, strict=True))

    async def _write(self, grant: _Grant) -> None:
        num_bytes, started_at = self._shards.block_num_bytes, time.monotonic()

        def remember(settled: asyncio.Future[None]) -> None:
            grant.late = settled

        try:
            await grant.shard.write(
                [self._block_ids[index] * num_bytes for index in grant.indices],
                grant.offsets,
                num_bytes,
                self._deadline.remaining_s,
                remember,
            )
        except TROUBLE:
            return
        self._shards.count_moved("put", len(grant.indices), time.monotonic() - started_at)
        grant.is_written = True

    async def _seal(self, grant: _Grant) -> None:
        grant.is_closed = True
        num_sealed = await self._shards.background.keep(
            self._seal_or_give_back(grant), undo=lambda _: self._forget_private(grant)
        )
        self._num_sealed += num_sealed  # after the await: shards seal side by side

    async def _seal_or_give_back(self, grant: _Grant) -> int:
        request = kvstore_pb2.SealRequest(
            incarnation=self._shards.incarnation,
            reservation_ids=grant.reservation_ids,
            digests=[self._digests[index] & _DIGEST_MASK for index in grant.indices],
        )
        try:
            response = await grant.shard.call("Seal", request, RPC_TIMEOUT_S)
        except TROUBLE:
            self._shards.background.spawn(self._give_back(grant))
            return 0
        if not all(response.sealed):
            self._shards.background.spawn(self._give_back(grant))
        return sum(response.sealed)

    async def _give_back(self, grant: _Grant) -> None:
        """Acknowledges all reservations of a grant; the store ignores those that were sealed."""
        if not grant.reservation_ids:
            return
        if grant.late is not None:
            await asyncio.wait([grant.late])
        request = kvstore_pb2.AcknowledgeRequest(
            incarnation=self._shards.incarnation, reservation_ids=grant.reservation_ids
        )
        await grant.shard.call("Acknowledge", request, RPC_TIMEOUT_S, even_down=True)

    async def _forget_private(self, grant: _Grant) -> None:
        """A private block whose publisher was cancelled has no reader."""
        if self._is_private:
            keys = [self._keys[index] for index in grant.indices]
            request = kvstore_pb2.DiscardRequest(keys=keys)
            await grant.shard.call("Discard", request, RPC_TIMEOUT_S, even_down=True)
