"""KvStoreService: the wire's side of the block index.

Owns validation and translation; every decision is the index's. Bytes never pass through here.
Handlers run on the event loop; only Lookups (of blocks in lower tiers or being written), Fetches
and Watches wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from kv.transfer import Transfer
from mesh.errors import FailedPrecondition, Unavailable
from mesh.kvstore_agent import agent_from_wire, agent_to_wire
from mesh.telemetry import Telemetry
from protos import kvstore_pb2, kvstore_pb2_grpc
from services.kvstore.block import Leased, LeaseOutcome, Reserved, ReserveOutcome
from services.kvstore.callers import CallerTable
from services.kvstore.fetches import Fetches, FetchOutcome
from services.kvstore.index import BlockIndex
from services.kvstore.mover import Mover
from services.kvstore.validation import (
    MAX_LIFE_NUM_BYTES,
    MAX_TENANT_NUM_BYTES,
    check_count,
    check_deadline,
    check_keys,
    check_num_bytes,
    check_present,
    check_same_len,
    check_text,
    check_ttl,
    check_wait,
)
from services.kvstore.waiting import Waiting
from services.kvstore.watching import MAX_WATCHERS, Watchers

DEFAULT_WAIT_S = 1.0

_OUTCOMES = {
    ReserveOutcome.RESERVED: kvstore_pb2.Reservation.OUTCOME_RESERVED,
    ReserveOutcome.ALREADY_SEALED: kvstore_pb2.Reservation.OUTCOME_ALREADY_SEALED,
    ReserveOutcome.ALREADY_RESERVED: kvstore_pb2.Reservation.OUTCOME_ALREADY_RESERVED,
    ReserveOutcome.FULL: kvstore_pb2.Reservation.OUTCOME_FULL,
}
_FETCHED = {
    FetchOutcome.WRITTEN: kvstore_pb2.FetchResponse.OUTCOME_WRITTEN,
    FetchOutcome.EXPIRED: kvstore_pb2.FetchResponse.OUTCOME_EXPIRED,
    FetchOutcome.BROKEN: kvstore_pb2.FetchResponse.OUTCOME_BROKEN,
}
log = logging.getLogger("kvmesh.kvstore")


class KvStoreServicer(kvstore_pb2_grpc.KvStoreServiceServicer):
    """Handlers over one index and one arena, and over lower tiers if there is a mover."""

    def __init__(
        self,
        *,
        index: BlockIndex,
        callers: CallerTable,
        transfer: Transfer,
        telemetry: Telemetry,
        mover: Mover | None = None,
        max_watchers: int = MAX_WATCHERS,
    ) -> None:
        self._index = index
        self._waiting = Waiting(index)
        self._mover = mover
        self._callers = callers
        self._agent = transfer.agent
        self._fetches = Fetches(index=index, transfer=transfer, telemetry=telemetry)
        self._watchers = Watchers(index=index, life=self._agent.name, limit=max_watchers)
        self._telemetry = telemetry
        self._draining = False
        self._is_size_reported = False

    def drain(self) -> None:
        """Refuses reservations, lookups and pins and ends watches; what is under way may end."""
        self._draining = True
        self._watchers.close()

    async def expire(self) -> None:
        """Forgets silent callers, and their agents."""
        for agent_name in self._callers.expire():
            await self._fetches.forget(agent_name)

    async def Connect(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.ConnectRequest, context: object
    ) -> kvstore_pb2.ConnectResponse:
        """Exchanges agents with a peer of the same NIXL version. Ends its Fetches of before."""
        theirs = request.agent
        check_present("agent.name", theirs.name)
        check_present("agent.incarnation", theirs.incarnation)
        if theirs.nixl_version != self._agent.nixl_version:
            raise FailedPrecondition(
                f"agent.nixl_version {theirs.nixl_version!r}; this store runs "
                f"{self._agent.nixl_version!r} and peers must run the same",
                reason="NIXL_VERSION_MISMATCH",
            )
        self._check_open()
        if before := self._callers.add(theirs):
            await self._fetches.forget(before)
        return kvstore_pb2.ConnectResponse(agent=agent_to_wire(self._agent))

    async def Reserve(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.ReserveRequest, context: object
    ) -> kvstore_pb2.ReserveResponse:
        """Slots for new blocks."""
        check_keys("keys", request.keys)
        check_ttl(request.ttl_s)
        check_text("tenant", request.tenant, MAX_TENANT_NUM_BYTES)
        self._callers.require(request.incarnation)
        self._report_size(request.num_bytes)
        check_num_bytes(request.num_bytes, self._agent.arena_num_bytes)
        self._check_open()
        answers = self._index.reserve(
            request.incarnation,
            request.keys,
            request.num_bytes,
            ttl_s=request.ttl_s,
            is_private=request.is_private,
            tenant=request.tenant,
            attempt=request.attempt,
        )
        messages = [_reservation(answer, request.num_bytes) for answer in answers]
        return kvstore_pb2.ReserveResponse(reservations=messages)

    async def Seal(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.SealRequest, context: object
    ) -> kvstore_pb2.SealResponse:
        """Makes written blocks visible."""
        check_count("reservation_ids", request.reservation_ids)
        check_same_len("digests", request.digests, "reservation_ids", request.reservation_ids)
        self._callers.require(request.incarnation)
        sealed = [False] * len(request.reservation_ids)
        if self._is_own(request.life):
            sealed = self._index.seal(request.incarnation, request.reservation_ids, request.digests)
            self._wake()
            await asyncio.sleep(0)  # who waits for these blocks is answered before their writer
        return kvstore_pb2.SealResponse(sealed=sealed)

    async def Acknowledge(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.AcknowledgeRequest, context: object
    ) -> kvstore_pb2.AcknowledgeResponse:
        """Frees slots that the writer is done with; ends what lost answers told of."""
        check_count("reservation_ids", request.reservation_ids)
        check_count("attempts", request.attempts)
        owner, num_freed = request.incarnation, 0
        if request.reservation_ids and self._is_own(request.life):
            num_freed += self._index.acknowledge(owner, request.reservation_ids)
        if request.attempts:
            num_freed += self._index.give_up(owner, request.attempts)
        return kvstore_pb2.AcknowledgeResponse(num_freed=num_freed)

    async def Lookup(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.LookupRequest, context: object
    ) -> kvstore_pb2.LookupResponse:
        """Leases the longest sealed prefix."""
        check_keys("keys", request.keys)
        check_num_bytes(request.num_bytes, self._agent.arena_num_bytes)
        check_ttl(request.ttl_s)
        max_wait_s = request.max_wait_s if request.HasField("max_wait_s") else DEFAULT_WAIT_S
        check_wait(max_wait_s)
        self._callers.require(request.incarnation)
        self._check_open()
        leased = await self._look_up(request, max_wait_s)
        return kvstore_pb2.LookupResponse(
            lease_id=leased.lease_id,
            offsets=leased.offsets.tolist(),
            digests=leased.digests.tolist(),
            num_bytes=leased.num_bytes,
        )

    async def Fetch(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.FetchRequest, context: object
    ) -> kvstore_pb2.FetchResponse:
        """WRITEs leased blocks to their reader."""
        check_count("local_offsets", request.local_offsets)
        check_deadline(request.deadline_s)
        reader = agent_from_wire(self._callers.require(request.incarnation))
        outcome = FetchOutcome.EXPIRED
        if self._is_own(request.life):
            offsets, deadline_s = list(request.local_offsets), request.deadline_s
            outcome = await self._fetches.fetch(reader, request.lease_id, offsets, deadline_s)
        return kvstore_pb2.FetchResponse(outcome=_FETCHED[outcome])

    async def Release(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.ReleaseRequest, context: object
    ) -> kvstore_pb2.ReleaseResponse:
        """Ends a lease; drops what the reader found corrupt."""
        check_keys("corrupt_keys", request.corrupt_keys)
        outcome = LeaseOutcome.EXPIRED
        if request.lease_id and self._is_own(request.life):
            outcome = self._index.release(request.incarnation, request.lease_id)
        if num_dropped := self._index.drop_corrupt(request.corrupt_keys):
            failures = self._telemetry.instruments.kv_verify_failures
            failures.add(num_dropped, {"reason": "reported_corrupt"})
            self._wake()
        held = outcome is LeaseOutcome.HELD
        kinds = kvstore_pb2.ReleaseResponse
        return kinds(outcome=kinds.OUTCOME_HELD if held else kinds.OUTCOME_EXPIRED)

    async def Discard(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.DiscardRequest, context: object
    ) -> kvstore_pb2.DiscardResponse:
        """Drops private blocks."""
        check_keys("keys", request.keys)
        return kvstore_pb2.DiscardResponse(num_dropped=self._index.discard(request.keys))

    async def Pin(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.PinRequest, context: object
    ) -> kvstore_pb2.PinResponse:
        """Keeps blocks from eviction."""
        check_keys("keys", request.keys)
        check_ttl(request.ttl_s)
        self._callers.require(request.incarnation)
        self._check_open()
        num_pinned, pin_id = self._index.pin(request.incarnation, request.keys, ttl_s=request.ttl_s)
        return kvstore_pb2.PinResponse(num_pinned=num_pinned, pin_id=pin_id)

    async def Unpin(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.UnpinRequest, context: object
    ) -> kvstore_pb2.UnpinResponse:
        """Ends a pin."""
        unpinned = self._index.unpin(request.incarnation, request.pin_id)
        return kvstore_pb2.UnpinResponse(unpinned=unpinned)

    def Watch(  # noqa: N802 - gRPC method name
        self, request: kvstore_pb2.WatchRequest, context: object
    ) -> AsyncIterator[kvstore_pb2.WatchResponse]:
        """What the store has and how that changes."""
        check_text("life", request.life, MAX_LIFE_NUM_BYTES)
        self._check_open()
        return self._watchers.stream(request)

    async def _look_up(self, request: kvstore_pb2.LookupRequest, max_wait_s: float) -> Leased:
        owner, keys, num_bytes = request.incarnation, list(request.keys), request.num_bytes
        ttl_s, attempt = request.ttl_s, request.attempt
        if request.waits_for_writers:
            max_wait_s = await self._waiting.until_written(keys, max_wait_s)
        if self._mover is None:
            leased = self._index.lookup(owner, keys, num_bytes, ttl_s=ttl_s, attempt=attempt)
        else:
            leased = await self._mover.lookup(
                owner, keys, num_bytes, ttl_s=ttl_s, max_wait_s=max_wait_s, attempt=attempt
            )
        if not request.waits_for_writers:  # a hand-over finds its blocks: it is no reuse
            self._count_lookup(len(keys), leased)
        return leased

    def _count_lookup(self, num_keys: int, leased: Leased) -> None:
        counter, num_found = self._telemetry.instruments.kv_lookup_blocks, len(leased.offsets)
        counter.add(num_found - leased.num_promoted, {"result": "memory"})
        counter.add(leased.num_promoted, {"result": "below"})
        counter.add(num_keys - num_found, {"result": "miss"})

    def _wake(self) -> None:
        """Blocks were sealed or dropped: there may be something to move."""
        if self._mover is not None:
            self._mover.wake()

    def _report_size(self, num_bytes: int) -> None:
        """Says once that a worker's block is larger than the arena: workers only recompute."""
        arena_num_bytes = self._agent.arena_num_bytes
        if num_bytes > arena_num_bytes and not self._is_size_reported:
            self._is_size_reported = True
            log.warning(
                "--kv-bytes %d is less than one block of %d bytes, so nothing is stored or reused; "
                "give more (kvmesh up: --store-bytes)",
                arena_num_bytes,
                num_bytes,
            )

    def _is_own(self, life: str) -> bool:
        """Whether ids of that life name anything here; another's may be equal by chance."""
        check_present("life", life)
        return life == self._agent.name

    def _check_open(self) -> None:
        if self._draining:
            raise Unavailable("this store is draining", reason="DRAINING", retryable=True)


def _reservation(answer: Reserved, num_bytes: int) -> kvstore_pb2.Reservation:
    message = kvstore_pb2.Reservation(outcome=_OUTCOMES[answer.outcome])
    if answer.outcome is ReserveOutcome.RESERVED:
        message.reservation_id = answer.reservation_id
        message.slot.offset, message.slot.num_bytes = answer.offset, num_bytes
    return message
