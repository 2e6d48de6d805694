"""One pull: Lookup, READ or Fetch, Release, verify. Owns the leases of the pull, which always end.

Never returns a block unless it was read whole, under a lease that held, and has the digest that was
stored at Seal. The store's trouble becomes a shorter prefix and a counted failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kv.errors import TransferTimeout
from mesh import spans
from mesh.kvstore_shard import MAX_KEYS, RPC_TIMEOUT_S, TROUBLE, Shard
from mesh.kvstore_shards import Deadline, Shards, each
from protos import kvstore_pb2

Hold = Callable[[list[int], "asyncio.Future[None]"], None]
_DIGEST_MASK = 2**64 - 1
# A store may take this long to bring blocks from lower tiers, or to wait for them to be written;
# the call itself needs the rest.
_MAX_WAIT_S = RPC_TIMEOUT_S / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """What a pull brought: the first num_blocks are in place and verified.

    Its seconds: of the lookup, of the transfer, of the lease's end and the digests beside it. They
    follow each other without a gap until ended_at, on the monotonic clock.
    """

    num_blocks: int
    failures: tuple[str, ...]
    lookup_s: float = 0.0
    get_s: float = 0.0
    verify_s: float = 0.0
    ended_at: float = field(default_factory=time.monotonic)

    @property
    def began_at(self) -> float:
        """When the lookup began, on the monotonic clock."""
        return self.ended_at - self.lookup_s - self.get_s - self.verify_s


@dataclass(slots=True, kw_only=True)
class _Lease:
    """Blocks that one store lends; `indices` are positions among the pull's keys.

    offsets and digests are those of the store, one per index.
    """

    shard: Shard
    life: str
    lease_id: int
    attempt: int
    indices: list[int]
    offsets: list[int]
    digests: list[int]
    is_released: bool = False


class Pull:
    """One pull of `keys` into local blocks `block_ids`."""

    def __init__(
        self,
        *,
        shards: Shards,
        keys: Sequence[bytes],
        block_ids: Sequence[int],
        deadline: Deadline,
        hold: Hold,
        waits_for_writers: bool,
    ) -> None:
        self._shards = shards
        self._keys = keys
        self._block_ids = block_ids
        self._deadline = deadline
        self._hold = hold
        self._waits_for_writers = waits_for_writers
        self._leases: list[_Lease] = []
        self._lent: dict[int, tuple[Shard, int]] = {}  # with the digest that was sealed
        self._read: set[int] = set()
        self._digests: list[int] = []
        self.failures: list[str] = []
        self._times_s: dict[str, float] = {}  # of each phase, by its span's name
        self._at = time.monotonic()  # when the last phase ended: the next one begins then

    async def run(self) -> PullResult:
        """Brings what there is."""
        num_blocks = await self._run()
        times_s = self._times_s
        return PullResult(
            num_blocks=num_blocks,
            failures=tuple(self.failures),
            lookup_s=times_s.get(spans.LOOKUP.name, 0.0),
            get_s=times_s.get(spans.GET.name, 0.0),
            verify_s=times_s.get(spans.VERIFY.name, 0.0),
            ended_at=self._at,
        )

    async def _run(self) -> int:
        """How many leading blocks are in place and verified."""
        try:
            with self._phase(spans.LOOKUP):
                assigned = self._shards.assign(self._keys)
                await each(self._look_up(shard, indices) for shard, indices in assigned)
            num_found = _prefix(self._lent)
            if num_found == 0:
                return 0
            with self._phase(spans.GET):
                wanted = [x for x in self._leases if x.indices and x.indices[0] < num_found]
                await each(self._fetch(lease, num_found) for lease in wanted)
            with self._phase(spans.VERIFY):
                # Side by side: digests are of local bytes, which no end of a lease changes any more
                await each([self._digest(), *(self._confirm(lease) for lease in wanted)])
                return self._verify(_prefix(self._read))
        finally:
            for lease in self._leases:
                if not lease.is_released:
                    self._give_back(lease)
                    lease.shard.uses.drop()

    @contextlib.contextmanager
    def _phase(self, span_type: spans.SpanType) -> Iterator[None]:
        """Times what is inside; its span says the same."""
        began_at = self._at
        span = self._shards.telemetry.tracing.begin(span_type, at=began_at)
        try:
            with span.current():
                yield
        finally:
            self._at = time.monotonic()
            self._times_s[span_type.name] = self._at - began_at
            span.end(self._at)

    async def _look_up(self, shard: Shard, indices: list[int]) -> None:
        """Leases the longest sealed prefix of one shard's keys, MAX_KEYS at a time."""
        for first in range(0, len(indices), MAX_KEYS):
            chunk = indices[first : first + MAX_KEYS]
            give_back, ttl_s = self._shards.give_back, self._deadline.ttl_s
            try:
                with give_back.unless_answered(shard, ttl_s) as attempt:
                    lease = await self._lease(shard, chunk, attempt)
            except TROUBLE:
                self._fail("lookup", len(chunk))
                return
            if lease.lease_id:
                self._leases.append(lease)
            for index, digest in zip(lease.indices, lease.digests, strict=True):
                self._lent[index] = (shard, digest)
            if len(lease.indices) < len(chunk):
                return

    async def _lease(self, shard: Shard, indices: list[int], attempt: int) -> _Lease:
        request = kvstore_pb2.LookupRequest(
            incarnation=self._shards.incarnation,
            keys=[self._keys[index] for index in indices],
            num_bytes=self._shards.block_num_bytes,
            ttl_s=self._deadline.ttl_s,
            max_wait_s=min(_MAX_WAIT_S, self._deadline.remaining_s / 2),
            waits_for_writers=self._waits_for_writers,
            attempt=attempt,
        )
        life = shard.life
        response = await shard.call("Lookup", request, self._deadline.remaining_s)
        offsets, digests = list(response.offsets), list(response.digests)
        num_found = min(len(offsets), len(digests), len(indices))
        num_bytes = response.num_bytes
        bad = (i for i in range(num_found) if not self._shards.fits(shard, offsets[i], num_bytes))
        num_good = next(bad, num_found)
        if response.lease_id:
            shard.uses.add()
        if num_good < num_found:
            self._fail("slot", num_found - num_good)
        return _Lease(
            shard=shard,
            life=life,
            lease_id=response.lease_id,
            attempt=attempt,
            indices=indices[:num_good],
            offsets=offsets[:num_good],
            digests=digests[:num_good],
        )

    async def _fetch(self, lease: _Lease, num_found: int) -> None:
        """Brings one lease's blocks of the common prefix."""
        indices = [index for index in lease.indices if index < num_found]
        local_ids = [self._block_ids[index] for index in indices]
        num_bytes, started_at = self._shards.block_num_bytes, time.monotonic()
        try:
            await lease.shard.read(
                [block_id * num_bytes for block_id in local_ids],
                lease.offsets[: len(indices)],
                num_bytes,
                self._deadline.remaining_s,
                lambda settled: self._hold(local_ids, settled),
                life=lease.life,
                lease_id=lease.lease_id,
            )
        except TROUBLE as error:
            reason = "timeout" if isinstance(error, TransferTimeout) else "read"
            self._fail(reason, len(indices))
            return
        self._shards.count_moved("get", len(indices), time.monotonic() - started_at)
        self._read.update(indices)

    async def _confirm(self, lease: _Lease) -> None:
        """Ends a lease; blocks of one that had expired are not used."""
        lease.is_released = True
        if not await asyncio.shield(self._shards.background.spawn(self._release(lease))):
            lost = self._read.intersection(lease.indices)
            if lost:
                self._fail("lease", len(lost))
            self._read -= lost

    async def _release(self, lease: _Lease) -> bool:
        request = kvstore_pb2.ReleaseRequest(
            incarnation=self._shards.incarnation, lease_id=lease.lease_id, life=lease.life
        )
        try:
            response = await lease.shard.call("Release", request, RPC_TIMEOUT_S, even_down=True)
        except TROUBLE:
            self._give_back(lease)
            return False
        finally:
            lease.shard.uses.drop()
        return response.outcome == kvstore_pb2.ReleaseResponse.OUTCOME_HELD

    def _give_back(self, lease: _Lease) -> None:
        self._shards.give_back.attempt(lease.shard, lease.attempt, self._deadline.ttl_s)

    async def _digest(self) -> None:
        """Digests of what was read, as they are here."""
        num_read = _prefix(self._read)
        if not num_read:
            return
        try:
            async with asyncio.timeout(self._deadline.remaining_s):
                self._digests = await self._shards.digest(list(self._block_ids[:num_read]))
        except TimeoutError:
            self._fail("timeout", num_read)

    def _verify(self, num_read: int) -> int:
        """Compares digests; cuts at the first block that differs and reports all that do."""
        num_read = min(num_read, len(self._digests))
        corrupt = [
            index
            for index in range(num_read)
            if self._digests[index] & _DIGEST_MASK != self._lent[index][1]
        ]
        if not corrupt:
            return num_read
        self._fail("digest", len(corrupt))
        by_shard: dict[Shard, list[bytes]] = {}
        for index in corrupt:
            by_shard.setdefault(self._lent[index][0], []).append(self._keys[index])
        for shard, keys in by_shard.items():
            self._shards.background.spawn(self._report(shard, keys))
        return corrupt[0]

    async def _report(self, shard: Shard, keys: list[bytes]) -> None:
        """Tells a store which of its blocks are corrupt; lease 0, for the lease has ended."""
        for first in range(0, len(keys), MAX_KEYS):
            request = kvstore_pb2.ReleaseRequest(
                incarnation=self._shards.incarnation, corrupt_keys=keys[first : first + MAX_KEYS]
            )
            await shard.call("Release", request, RPC_TIMEOUT_S)

    def _fail(self, reason: str, num_blocks: int) -> None:
        self.failures.append(reason)
        self._shards.telemetry.instruments.kv_verify_failures.add(num_blocks, {"reason": reason})


def _prefix(present: dict[int, tuple[Shard, int]] | set[int]) -> int:
    """How many of 0, 1, 2, ... are present without a gap."""
    num = 0
    while num in present:
        num += 1
    return num
