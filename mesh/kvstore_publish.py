"""One publish: Reserve for all blocks at once, then WRITE, digest and Seal part by part.

Slots can so be asked for while their blocks are still being computed. Owns the reservations, which
always end. Never seals a block whose WRITE did not end well. A reservation whose WRITE is late is
acknowledged when that transfer is over, not before: the store reuses the slot then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from mesh import spans
from mesh.kvstore_shard import MAX_KEYS, RPC_TIMEOUT_S, TROUBLE, Shard
from mesh.kvstore_shards import Deadline, Shards, each
from mesh.kvstore_slots import Grant, Part, Slot
from protos import kvstore_pb2

_DIGEST_MASK = 2**64 - 1


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
        self._slots: dict[int, Slot] = {}
        self._sealed: set[int] = set()
        self._is_closed = False

    async def reserve(self, deadline: Deadline) -> None:
        """Asks the stores for slots; those that have trouble give none."""
        await self._ask(range(len(self._keys)), deadline)

    async def send(
        self,
        first: int,
        block_ids: Sequence[int],
        deadline: Deadline,
        may_seal: asyncio.Future[bool] | None = None,
    ) -> int:
        """Sends local blocks block_ids under the keys from `first` on; how many are sealed now.

        may_seal is awaited between WRITE and Seal: nothing is sealed if it is False or late.
        """
        with self._shards.telemetry.tracing.span(spans.PUBLISH) as span:
            num_sealed = await self._send(first, block_ids, deadline, may_seal)
            span.set({spans.KEYS: len(block_ids), spans.BLOCKS: num_sealed})
        return num_sealed

    async def _send(
        self,
        first: int,
        block_ids: Sequence[int],
        deadline: Deadline,
        may_seal: asyncio.Future[bool] | None,
    ) -> int:
        indices = range(first, first + len(block_ids))
        await self._renew(indices, deadline)
        blocks = dict(zip(indices, block_ids, strict=True))
        parts, digests = self._parts(indices), dict[int, int]()
        try:
            if parts:
                writes = (self._write(part, blocks, deadline) for part in parts.values())
                await each([self._digest(parts, blocks, digests, deadline), *writes])
                written = [part for part in parts.values() if part.is_written]
                if digests and (may_seal is None or await _in_time(may_seal, deadline)):
                    await each(self._seal(part, digests) for part in written)
            return sum(index in self._sealed for index in indices)
        finally:
            for part in parts.values():
                if not part.is_closed:
                    self._give_up(part)

    async def _renew(self, indices: Sequence[int], deadline: Deadline) -> None:
        """Asks anew for slots that end too early, and for what no slot was given for."""
        old = [
            self._slots.pop(index)
            for index in indices
            if index in self._slots and not self._slots[index].holds_until(deadline)
        ]
        if old:
            told = self._give_back(old)
            await asyncio.wait(told, timeout=min(RPC_TIMEOUT_S, deadline.remaining_s))
        # Given back just now, or what had another writer, or a store in trouble, then.
        missing = [i for i in indices if i not in self._slots and i not in self._sealed]
        if missing:
            await self._ask(missing, deadline)

    def _parts(self, indices: Sequence[int]) -> dict[tuple[Shard, str], Part]:
        """Takes the slots of these keys, by store."""
        parts: dict[tuple[Shard, str], Part] = {}
        for index in indices:
            slot = self._slots.pop(index, None)
            if slot is not None:
                part = parts.setdefault(
                    (slot.shard, slot.life),
                    Part(shard=slot.shard, life=slot.life, indices=[], slots=[]),
                )
                part.indices.append(index)
                part.slots.append(slot)
        return parts

    def close(self) -> None:
        """Gives back what was not sent, also what a `reserve` under way still gets."""
        self._is_closed = True
        slots, self._slots = self._slots, {}
        self._give_back(slots.values())

    async def _ask(self, indices: Sequence[int], deadline: Deadline) -> None:
        assigned = self._shards.assign([self._keys[index] for index in indices])
        await each(
            self._reserve(shard, [indices[place] for place in places], deadline)
            for shard, places in assigned
        )

    async def _reserve(self, shard: Shard, indices: list[int], deadline: Deadline) -> None:
        for start in range(0, len(indices), MAX_KEYS):
            chunk = indices[start : start + MAX_KEYS]
            try:
                with self._shards.give_back.unless_answered(shard, self._ttl_s) as attempt:
                    grant = await self._grant(shard, chunk, deadline, attempt)
            except TROUBLE:
                return
            self._sealed |= grant.sealed
            if self._is_closed:  # meanwhile
                self._give_back(grant.slots.values())
            else:
                self._slots |= grant.slots

    async def _grant(
        self, shard: Shard, indices: list[int], deadline: Deadline, attempt: int
    ) -> Grant:
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
        grant = Grant()
        for index, reservation in zip(indices, response.reservations, strict=False):
            if reservation.outcome == kvstore_pb2.Reservation.OUTCOME_ALREADY_SEALED:
                grant.sealed.add(index)
            elif reservation.outcome != kvstore_pb2.Reservation.OUTCOME_RESERVED:
                continue
            elif self._shards.fits(shard, reservation.slot.offset, reservation.slot.num_bytes):
                grant.slots[index] = Slot(
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
        parts: dict[tuple[Shard, str], Part],
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

    async def _write(self, part: Part, blocks: dict[int, int], deadline: Deadline) -> None:
        num_bytes, started_at = self._shards.block_num_bytes, time.monotonic()

        def remember(settled: asyncio.Future[None]) -> None:
            part.late = settled

        with self._shards.telemetry.tracing.span(
            spans.WRITE, attributes={spans.BLOCKS: len(part.indices)}
        ) as span:
            try:
                await part.shard.write(
                    [blocks[index] * num_bytes for index in part.indices],
                    [slot.offset for slot in part.slots],
                    num_bytes,
                    deadline.remaining_s,
                    remember,
                    life=part.life,
                )
            except TROUBLE as error:
                span.fail(type(error).__name__)
                return
        self._shards.count_moved("put", len(part.indices), time.monotonic() - started_at)
        part.is_written = True

    async def _seal(self, part: Part, digests: dict[int, int]) -> None:
        part.is_closed = True
        with self._shards.telemetry.tracing.span(spans.SEAL) as span:
            sealed = await self._shards.background.keep(
                self._seal_or_give_back(part, digests), undo=lambda _: self._forget_private(part)
            )
            span.set({spans.BLOCKS: len(sealed)})
        self._sealed |= sealed

    async def _seal_or_give_back(self, part: Part, digests: dict[int, int]) -> set[int]:
        request = kvstore_pb2.SealRequest(
            incarnation=self._shards.incarnation,
            reservation_ids=part.reservation_ids,
            digests=[digests[index] & _DIGEST_MASK for index in part.indices],
            life=part.life,
        )
        try:
            response = await part.shard.call("Seal", request, RPC_TIMEOUT_S)
        except TROUBLE:
            self._give_up(part)
            return set()
        if not all(response.sealed):
            self._give_up(part)
        else:
            part.shard.uses.drop(len(part.slots))
        return {index for index, ok in zip(part.indices, response.sealed, strict=False) if ok}

    def _give_up(self, part: Part) -> None:
        """Gives back all slots of a part; the store ignores those that were sealed."""
        if part.late is None:
            self._give_back(part.slots)
        else:
            self._shards.background.spawn(self._give_back_late(part, part.late))

    async def _give_back_late(self, part: Part, late: asyncio.Future[None]) -> None:
        await asyncio.wait([late])
        self._give_back(part.slots)

    def _give_back(self, slots: Iterable[Slot]) -> set[asyncio.Task[None]]:
        """Queues slots that nothing is written to any more; tasks that end when all is told."""
        by_life: dict[tuple[Shard, str], list[int]] = {}
        for slot in slots:
            by_life.setdefault((slot.shard, slot.life), []).append(slot.reservation_id)
        tasks: set[asyncio.Task[None]] = set()
        for (shard, life), numbers in by_life.items():
            tasks.add(self._shards.give_back.slots(shard, life, numbers, self._ttl_s))
            shard.uses.drop(len(numbers))
        return tasks

    async def _forget_private(self, part: Part) -> None:
        """A private block whose publisher was cancelled has no reader."""
        if self._is_private:
            keys = [self._keys[index] for index in part.indices]
            request = kvstore_pb2.DiscardRequest(keys=keys)
            await part.shard.call("Discard", request, RPC_TIMEOUT_S, even_down=True)


async def _in_time(answer: asyncio.Future[bool], deadline: Deadline) -> bool:
    try:
        async with asyncio.timeout(deadline.remaining_s):
            return await asyncio.shield(answer)  # others wait for it, too
    except TimeoutError:
        return False
