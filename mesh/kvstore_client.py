"""A worker's view of the kvstore: pull and publish blocks over all shards.

Owns the protocol of the design's section 4 on the worker's side. Never raises for the store's trouble: the
store is a cache, so trouble means fewer blocks. Local block b lives at local offset b * block_num_bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass

import grpc

from kv.errors import TransferError
from kv.transfer import Transfer
from mesh.channel import open_channel as open_mesh_channel
from mesh.rendezvous import owner
from mesh.shard import Shard, ShardDown, ShardState
from mesh.telemetry import Telemetry
from protos import kvstore_pb2

Hold = Callable[[list[int], asyncio.Future[None]], None]
_TTL_S = 30.0
_MAX_KEYS = 4096
_START_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """How many leading blocks are in place and verified, and the seconds it took."""

    num_blocks: int
    get_s: float


@dataclass(slots=True)
class _Leased:
    """What one shard lent: positions in the key list, offsets, digests."""

    shard: Shard
    lease_id: int
    positions: list[int]
    offsets: list[int]
    digests: list[int]


class KvStoreClient:
    """Pulls and publishes blocks; build, `start`, use, `close`."""

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        transfer: Transfer,
        block_num_bytes: int,
        incarnation: str,
        digest: Callable[[list[int]], Awaitable[list[int]]],
        telemetry: Telemetry,
        open_channel: Callable[[str, Telemetry], grpc.aio.Channel] = open_mesh_channel,
    ) -> None:
        self._addresses = list(addresses)
        self._transfer = transfer
        self._num_bytes = block_num_bytes
        self._incarnation = incarnation
        self._digest = digest
        self._telemetry = telemetry
        self._open_channel = open_channel
        self._shards: dict[str, Shard] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def states(self) -> dict[str, str]:
        """State of each shard by address."""
        return {address: shard.state.value for address, shard in self._shards.items()}

    async def start(self) -> None:
        """Opens the shards and waits a moment for their first handshake."""
        for address in self._addresses:
            self._shards[address] = Shard(
                address=address,
                transfer=self._transfer,
                open_channel=lambda a: self._open_channel(a, self._telemetry),
            )
        waits = [shard.first_try(_START_TIMEOUT_S) for shard in self._shards.values()]
        await asyncio.gather(*waits)

    async def close(self) -> None:
        """Finishes releases in the background, then closes the shards."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)
        for shard in self._shards.values():
            await shard.close()

    async def pull(
        self, keys: Sequence[bytes], block_ids: Sequence[int], *, deadline_s: float, hold: Hold
    ) -> PullResult:
        """Lookup, READ, confirm, verify: fills block_ids with the longest sealed prefix of keys.

        `hold` is told of local blocks that a late READ may still write.
        """
        started_at = time.monotonic()
        with self._telemetry.tracer.start_as_current_span("kv.get"):
            num_blocks = 0
            for first in range(0, len(keys), _MAX_KEYS):
                part = keys[first : first + _MAX_KEYS]
                ids = list(block_ids[first : first + _MAX_KEYS])
                num_pulled = await self._pull_part(part, ids, deadline_s, hold)
                num_blocks += num_pulled
                if num_pulled < len(part):
                    break
        return PullResult(num_blocks=num_blocks, get_s=time.monotonic() - started_at)

    async def pull_private(
        self, key: bytes, block_id: int, *, deadline_s: float, hold: Hold
    ) -> bool:
        """Pulls one private block; the store drops it when its lease is released."""
        result = await self.pull([key], [block_id], deadline_s=deadline_s, hold=hold)
        return result.num_blocks == 1

    async def publish(
        self,
        keys: Sequence[bytes],
        block_ids: Sequence[int],
        *,
        is_private: bool = False,
        deadline_s: float,
    ) -> int:
        """Reserve, WRITE, Seal; returns how many of the blocks are sealed in the store now."""
        with self._telemetry.tracer.start_as_current_span("kv.put"):
            groups: dict[str, list[int]] = {}
            for position, key in enumerate(keys):
                if self._addresses:
                    groups.setdefault(owner(key, self._addresses), []).append(position)
            puts = [
                self._publish_on(
                    self._shards[address],
                    [keys[p] for p in positions],
                    [block_ids[p] for p in positions],
                    is_private,
                    deadline_s,
                )
                for address, positions in groups.items()
            ]
            return sum(await asyncio.gather(*puts))

    async def discard(self, keys: Sequence[bytes]) -> None:
        """Drops private blocks nobody will read."""
        for shard in self._shards.values():
            await self._try(shard, "Discard", kvstore_pb2.DiscardRequest(keys=keys))

    async def _pull_part(
        self, keys: Sequence[bytes], block_ids: list[int], deadline_s: float, hold: Hold
    ) -> int:
        leases = await self._lookup(keys)
        try:
            num_common = _common_prefix(len(keys), leases)
            intact = await self._read_all(leases, block_ids, num_common, deadline_s, hold)
        except asyncio.CancelledError:
            for lease in leases:
                self._spawn(self._release_quietly(lease))
            raise
        held = await asyncio.gather(*(self._release(lease) for lease in leases))
        broken = [
            position
            for lease, ok in zip(leases, held, strict=True)
            for position in lease.positions
            if not ok or not intact[id(lease)]
        ]
        num_good = min([num_common, *broken])
        return await self._verify(keys, block_ids, leases, num_good)

    async def _lookup(self, keys: Sequence[bytes]) -> list[_Leased]:
        groups: dict[str, list[int]] = {}
        for position, key in enumerate(keys):
            if self._addresses:
                groups.setdefault(owner(key, self._addresses), []).append(position)

        async def one(shard: Shard, positions: list[int]) -> _Leased | None:
            request = kvstore_pb2.LookupRequest(
                incarnation=self._incarnation,
                keys=[keys[p] for p in positions],
                num_bytes=self._num_bytes,
                ttl_s=_TTL_S,
            )
            response = await self._try(shard, "Lookup", request)
            if response is None or not response.blocks:
                return None
            return _Leased(
                shard=shard,
                lease_id=response.lease_id,
                positions=positions[: len(response.blocks)],
                offsets=[block.slot.offset for block in response.blocks],
                digests=[block.digest for block in response.blocks],
            )

        found = await asyncio.gather(*(one(self._shards[a], p) for a, p in groups.items()))
        return [lease for lease in found if lease is not None]

    async def _read_all(
        self,
        leases: list[_Leased],
        block_ids: list[int],
        num_common: int,
        deadline_s: float,
        hold: Hold,
    ) -> dict[int, bool]:
        async def read(lease: _Leased) -> bool:
            wanted = [
                (position, offset)
                for position, offset in zip(lease.positions, lease.offsets, strict=True)
                if position < num_common
            ]
            if not wanted:
                return True
            targets = [block_ids[position] for position, _ in wanted]
            offsets = [offset for _, offset in wanted]
            return await self._transfer_blocks(
                "read", lease.shard, targets, offsets, deadline_s, lambda s: hold(targets, s)
            )

        done = await asyncio.gather(*(read(lease) for lease in leases))
        return {id(lease): ok for lease, ok in zip(leases, done, strict=True)}

    async def _verify(
        self, keys: Sequence[bytes], block_ids: list[int], leases: list[_Leased], num_good: int
    ) -> int:
        """Compares digests of the first num_good blocks; reports and drops what does not match."""
        if num_good == 0:
            return 0
        actual = await self._digest(block_ids[:num_good])
        first_bad = num_good
        for lease in leases:
            pairs = zip(lease.positions, lease.digests, strict=True)
            corrupt = [p for p, d in pairs if p < num_good and actual[p] != d]
            if corrupt:
                first_bad = min(first_bad, *corrupt)
                self._count_failures("digest", len(corrupt))
                report = kvstore_pb2.ReleaseRequest(
                    incarnation=self._incarnation, corrupt_keys=[keys[p] for p in corrupt]
                )
                await self._try(lease.shard, "Release", report)
        return first_bad

    async def _release(self, lease: _Leased) -> bool:
        request = kvstore_pb2.ReleaseRequest(
            incarnation=self._incarnation, lease_id=lease.lease_id
        )
        response = await self._try(lease.shard, "Release", request)
        held = (
            response is not None and response.outcome == kvstore_pb2.ReleaseResponse.OUTCOME_HELD
        )
        if not held:
            self._count_failures("lease", len(lease.positions))
        return held

    async def _release_quietly(self, lease: _Leased) -> None:
        await self._release(lease)

    async def _publish_on(
        self,
        shard: Shard,
        keys: list[bytes],
        block_ids: list[int],
        is_private: bool,
        deadline_s: float,
    ) -> int:
        num_sealed = 0
        for first in range(0, len(keys), _MAX_KEYS):
            part = slice(first, first + _MAX_KEYS)
            num_sealed += await self._publish_part(
                shard, keys[part], block_ids[part], is_private, deadline_s
            )
        return num_sealed

    async def _publish_part(
        self,
        shard: Shard,
        keys: list[bytes],
        block_ids: list[int],
        is_private: bool,
        deadline_s: float,
    ) -> int:
        request = kvstore_pb2.ReserveRequest(
            incarnation=self._incarnation,
            keys=keys,
            num_bytes=self._num_bytes,
            is_private=is_private,
            ttl_s=_TTL_S,
        )
        response = await self._try(shard, "Reserve", request)
        if response is None:
            return 0
        kinds = kvstore_pb2.Reservation
        pairs = list(zip(response.reservations, block_ids, strict=True))
        num_known = sum(r.outcome == kinds.OUTCOME_ALREADY_SEALED for r, _ in pairs)
        mine = [(r, block) for r, block in pairs if r.outcome == kinds.OUTCOME_RESERVED]
        if not mine:
            return num_known
        ids = [reservation.reservation_id for reservation, _ in mine]
        blocks = [block for _, block in mine]
        offsets = [reservation.slot.offset for reservation, _ in mine]
        try:
            digests = await self._digest(blocks)
            written = await self._transfer_blocks(
                "write", shard, blocks, offsets, deadline_s, lambda s: self._ack_later(shard, ids, s)
            )
        except asyncio.CancelledError:
            self._spawn(self._acknowledge(shard, ids))
            raise
        if not written:
            self._spawn(self._acknowledge(shard, ids))
            return num_known
        seal = kvstore_pb2.SealRequest(
            incarnation=self._incarnation, reservation_ids=ids, digests=digests
        )
        sealed = await self._try(shard, "Seal", seal)
        return num_known + (sum(sealed.sealed) if sealed is not None else 0)

    async def _transfer_blocks(
        self,
        direction: str,
        shard: Shard,
        block_ids: list[int],
        offsets: list[int],
        deadline_s: float,
        on_late: Callable[[asyncio.Future[None]], None],
    ) -> bool:
        started_at = time.monotonic()
        move = self._transfer.read if direction == "read" else self._transfer.write
        local = [block * self._num_bytes for block in block_ids]
        try:
            await move(shard.peer, local, offsets, self._num_bytes, deadline_s, on_late)
        except TransferError as error:
            self._count_failures("transfer", len(block_ids))
            shard.lose(str(error))
            return False
        attributes = {"direction": direction}
        instruments = self._telemetry.instruments
        instruments.kv_transfer_duration.record(time.monotonic() - started_at, attributes)
        instruments.kv_transfer_io.add(len(block_ids) * self._num_bytes, attributes)
        return True

    def _ack_later(self, shard: Shard, ids: list[int], settled: asyncio.Future[None]) -> None:
        async def acknowledge() -> None:
            await asyncio.wait([settled])
            await self._acknowledge(shard, ids)

        self._spawn(acknowledge())

    async def _acknowledge(self, shard: Shard, ids: list[int]) -> None:
        request = kvstore_pb2.AcknowledgeRequest(
            incarnation=self._incarnation, reservation_ids=ids
        )
        await self._try(shard, "Acknowledge", request)

    async def _try(self, shard: Shard, method: str, request: object) -> object | None:
        """One call; None when the shard cannot serve it."""
        if shard.state is not ShardState.UP:
            return None
        try:
            return await shard.call(method, request)
        except ShardDown:
            return None

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _count_failures(self, reason: str, count: int) -> None:
        self._telemetry.instruments.kv_verify_failures.add(count, {"reason": reason})


def _common_prefix(num_keys: int, leases: list[_Leased]) -> int:
    """Length of the prefix of which every position is leased."""
    present = {position for lease in leases for position in lease.positions}
    return next((p for p in range(num_keys) if p not in present), num_keys)
