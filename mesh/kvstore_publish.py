"""One publish: Reserve for all blocks at once, then WRITE, digest and Seal part by part.

Slots can so be asked for while their blocks are still being computed. Owns the reservations, which
always end. Never seals a block whose WRITE did not end well. A reservation whose WRITE is late is
acknowledged when that transfer is over, not before: the store reuses the slot then.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh.kvstore_shard import RPC_TIMEOUT_S, Shard
from mesh.kvstore_shards import MAX_KEYS, TROUBLE, Deadline, Shards, each
from protos import kvstore_pb2

_DIGEST_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """Where a life of a store wants a block, until expires_at on the monotonic clock."""

    shard: Shard
    life: str
    reservation_id: int
    offset: int
    expires_at: float

    def holds_until(self, deadline: Deadline) -> bool:
        """Whether a WRITE that ends by the deadline still finds it reserved."""
        ends_at = time.monotonic() + deadline.remaining_s
        is_member = self.shard.life == self.life and not self.shard.has_left
        return is_member and ends_at < self.expires_at


@dataclass(slots=True, kw_only=True)
class _Part:
    """Blocks on their way to one store; `indices` are positions among the publish's keys."""

    shard: Shard
    indices: list[int]
    slots: list[_Slot]
    is_written: bool = False
    is_closed: bool = False
    late: asyncio.Future[None] | None = None

    @property
    def reservation_ids(self) -> list[int]:
        """Of the slots, in order."""
        return [slot.reservation_id for slot in self.slots]


@dataclass(slots=True, kw_only=True)
class _Grant:
    """One store's answer: slots and blocks sealed already, by position among the keys."""

    slots: dict[int, _Slot] = field(default_factory=dict)
    sealed: set[int] = field(default_factory=set)


class Publish:
    """One publish under `keys`: `reserve` once, `send` parts, `close` at the end.

    reserve_s: seconds that slots are kept for; tenant: on whose behalf.
    """

    def __init__(
        self,
        *,
        shards: Shards,
        keys: Sequence[bytes],
        is_private: bool,
        tenant: str,
        reserve_s: float,
    ) -> None:
        self._shards = shards
        self._keys = keys
        self._is_private = is_private
        self._tenant = tenant
        self._ttl_s = Deadline(reserve_s).ttl_s
        self._slots: dict[int, _Slot] = {}
        self._sealed: set[int] = set()
        self._is_closed = False

    async def reserve(self, deadline: Deadline) -> None:
        """Asks the stores for slots; those that have trouble give none."""
        await self._ask(range(len(self._keys)), deadline)

    async def send(self, first: int, block_ids: Sequence[int], deadline: Deadline) -> int:
        """Sends local blocks block_ids under the keys from `first` on; how many are sealed now."""
        with self._shards.telemetry.tracer.start_as_current_span("kv.put") as span:
            num_sealed = await self._send(first, block_ids, deadline)
            span.set_attribute("kvmesh.keys", len(block_ids))
            span.set_attribute("kvmesh.blocks", num_sealed)
        return num_sealed

    async def _send(self, first: int, block_ids: Sequence[int], deadline: Deadline) -> int:
        indices = range(first, first + len(block_ids))
        old = [
            self._slots.pop(index)
            for index in indices
            if index in self._slots and not self._slots[index].holds_until(deadline)
        ]
        if old:
            background = self._shards.background
            await asyncio.shield(background.spawn(self._give_back_slots(old)))
        # Given back just now, or what had another writer, or a store in trouble, then.
        missing = [i for i in indices if i not in self._slots and i not in self._sealed]
        if missing:
            await self._ask(missing, deadline)
        blocks = dict(zip(indices, block_ids, strict=True))
        parts: dict[tuple[Shard, str], _Part] = {}
        for index in indices:
            slot = self._slots.pop(index, None)
            if slot is not None:
                part = parts.setdefault(
                    (slot.shard, slot.life), _Part(shard=slot.shard, indices=[], slots=[])
                )
                part.indices.append(index)
                part.slots.append(slot)
        digests: dict[int, int] = {}
        try:
            if parts:
                writes = (self._write(part, blocks, deadline) for part in parts.values())
                await each([self._digest(parts, blocks, digests, deadline), *writes])
                written = [part for part in parts.values() if part.is_written]
                await each(self._seal(part, digests) for part in written if digests)
            return sum(index in self._sealed for index in indices)
        finally:
            for part in parts.values():
                if not part.is_closed:
                    self._shards.background.spawn(self._give_back(part))

    def close(self) -> None:
        """Gives back what was not sent, also what a `reserve` under way still gets."""
        self._is_closed = True
        slots, self._slots = self._slots, {}
        if slots:
            self._shards.background.spawn(self._give_back_slots(list(slots.values())))

    async def _ask(self, indices: Sequence[int], deadline: Deadline) -> None:
        assigned = self._shards.assign([self._keys[index] for index in indices])
        await each(
            self._reserve(shard, [indices[place] for place in places], deadline)
            for shard, places in assigned
        )

    async def _reserve(self, shard: Shard, indices: list[int], deadline: Deadline) -> None:
        for start in range(0, len(indices), MAX_KEYS):
            chunk = indices[start : start + MAX_KEYS]
            attempt = secrets.randbits(63) + 1
            try:
                grant = await self._shards.background.keep(
                    self._grant(shard, chunk, deadline, attempt),
                    undo=lambda grant: self._give_back_slots(list(grant.slots.values())),
                )
            except TROUBLE:
                self._shards.background.spawn(self._shards.take_back(shard, attempt, self._ttl_s))
                return
            self._sealed |= grant.sealed
            if self._is_closed:  # meanwhile
                self._shards.background.spawn(self._give_back_slots(list(grant.slots.values())))
            else:
                self._slots |= grant.slots

    async def _grant(
        self, shard: Shard, indices: list[int], deadline: Deadline, attempt: int
    ) -> _Grant:
        request = kvstore_pb2.ReserveRequest(
            incarnation=self._shards.incarnation,
            keys=[self._keys[index] for index in indices],
            num_bytes=self._shards.block_num_bytes,
            is_private=self._is_private,
            ttl_s=self._ttl_s,
            tenant=self._tenant,
            attempt=attempt,
        )
        # From here, not from the answer: the store's clock for it began later.
        life, expires_at = shard.life, time.monotonic() + self._ttl_s
        response = await shard.call("Reserve", request, deadline.remaining_s)
        grant = _Grant()
        for index, reservation in zip(indices, response.reservations, strict=False):
            if reservation.outcome == kvstore_pb2.Reservation.OUTCOME_ALREADY_SEALED:
                grant.sealed.add(index)
            elif reservation.outcome != kvstore_pb2.Reservation.OUTCOME_RESERVED:
                continue
            elif self._shards.fits(shard, reservation.slot.offset, reservation.slot.num_bytes):
                grant.slots[index] = _Slot(
                    shard=shard,
                    life=life,
                    reservation_id=reservation.reservation_id,
                    offset=reservation.slot.offset,
                    expires_at=expires_at,
                )
        shard.uses.add(len(grant.slots))
        return grant

    async def _digest(
        self,
        parts: dict[tuple[Shard, str], _Part],
        blocks: dict[int, int],
        digests: dict[int, int],
        deadline: Deadline,
    ) -> None:
        """Digests of what is to be sealed, while it is being written: both only read."""
        indices = [index for part in parts.values() for index in part.indices]
        try:
            async with asyncio.timeout(deadline.remaining_s):
                made = await self._shards.digest([blocks[index] for index in indices])
        except TimeoutError:
            return
        digests.update(zip(indices, made, strict=True))

    async def _write(self, part: _Part, blocks: dict[int, int], deadline: Deadline) -> None:
        num_bytes, started_at = self._shards.block_num_bytes, time.monotonic()

        def remember(settled: asyncio.Future[None]) -> None:
            part.late = settled

        try:
            await part.shard.write(
                [blocks[index] * num_bytes for index in part.indices],
                [slot.offset for slot in part.slots],
                num_bytes,
                deadline.remaining_s,
                remember,
                life=part.slots[0].life,
            )
        except TROUBLE:
            return
        self._shards.count_moved("put", len(part.indices), time.monotonic() - started_at)
        part.is_written = True

    async def _seal(self, part: _Part, digests: dict[int, int]) -> None:
        part.is_closed = True
        sealed = await self._shards.background.keep(
            self._seal_or_give_back(part, digests), undo=lambda _: self._forget_private(part)
        )
        self._sealed |= sealed

    async def _seal_or_give_back(self, part: _Part, digests: dict[int, int]) -> set[int]:
        request = kvstore_pb2.SealRequest(
            incarnation=self._shards.incarnation,
            reservation_ids=part.reservation_ids,
            digests=[digests[index] & _DIGEST_MASK for index in part.indices],
        )
        try:
            response = await part.shard.call("Seal", request, RPC_TIMEOUT_S)
        except TROUBLE:
            self._shards.background.spawn(self._give_back(part))
            return set()
        if not all(response.sealed):
            self._shards.background.spawn(self._give_back(part))
        else:
            part.shard.uses.drop(len(part.slots))
        return {index for index, ok in zip(part.indices, response.sealed, strict=False) if ok}

    async def _give_back(self, part: _Part) -> None:
        """Acknowledges all reservations of a part; the store ignores those that were sealed."""
        if part.late is not None:
            await asyncio.wait([part.late])
        await self._give_back_slots(part.slots)

    async def _give_back_slots(self, slots: Sequence[_Slot]) -> None:
        by_shard: dict[Shard, list[int]] = {}
        for slot in slots:
            by_shard.setdefault(slot.shard, []).append(slot.reservation_id)
        for shard, numbers in by_shard.items():
            request = kvstore_pb2.AcknowledgeRequest(
                incarnation=self._shards.incarnation, reservation_ids=numbers
            )
            try:
                with contextlib.suppress(*TROUBLE):  # its deadline ends them, then
                    await shard.call("Acknowledge", request, RPC_TIMEOUT_S, even_down=True)
            finally:
                shard.uses.drop(len(numbers))

    async def _forget_private(self, part: _Part) -> None:
        """A private block whose publisher was cancelled has no reader."""
        if self._is_private:
            keys = [self._keys[index] for index in part.indices]
            request = kvstore_pb2.DiscardRequest(keys=keys)
            await part.shard.call("Discard", request, RPC_TIMEOUT_S, even_down=True)
