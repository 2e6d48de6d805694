"""A worker's view of all kvstores. Local block b lies at b * block_num_bytes of the arena.

Owns its members and the work that outlives a request. Never raises for store trouble:
the store is a cache, and losing it costs only recomputation.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence

import grpc

from kv.transfer import Transfer
from mesh import spans
from mesh.channel import open_channel
from mesh.kvstore_background import Background
from mesh.kvstore_giveback import GiveBack
from mesh.kvstore_members import Members
from mesh.kvstore_publish import Publish
from mesh.kvstore_pull import Hold, Pull, PullResult
from mesh.kvstore_shard import MAX_KEYS, RPC_TIMEOUT_S, TROUBLE, Shard
from mesh.kvstore_shards import Deadline, Shards
from mesh.telemetry import Telemetry
from protos import kvstore_pb2

__all__ = ["Deadline", "Hold", "KvStoreClient", "Publish", "PullResult"]

_START_TIMEOUT_S = 2.5
_CLOSE_TIMEOUT_S = 2.0
RESERVE_S = 120.0
"""So long slots are kept for a prompt that is being computed; then they are asked for anew."""


class KvStoreClient:
    """All shards. `follow` says which, from then on; `close` before the transfer is closed.

    path: one of kv.path.PATH_CHOICES. ValueError: block_num_bytes is below 1.
    """

    def __init__(
        self,
        *,
        transfer: Transfer,
        block_num_bytes: int,
        incarnation: str,
        digest: Callable[[list[int]], Awaitable[list[int]]],
        telemetry: Telemetry,
        path: str = "auto",
        open_channel: Callable[[str, Telemetry | None], grpc.aio.Channel] = open_channel,
    ) -> None:
        if block_num_bytes < 1:
            raise ValueError(f"block_num_bytes: {block_num_bytes}; at least 1")

        def make(address: str) -> Shard:
            channel = open_channel(address, telemetry)
            return Shard(address=address, channel=channel, transfer=transfer, path=path)

        self._members = Members(make)
        background = Background()
        self._shards = Shards(
            shards=self._members.shards,
            block_num_bytes=block_num_bytes,
            incarnation=incarnation,
            digest=digest,
            telemetry=telemetry,
            background=background,
            give_back=GiveBack(incarnation=incarnation, background=background),
        )

    @property
    def states(self) -> dict[str, str]:
        """Address to connecting, up, down or leaving."""
        return self._members.states

    @property
    def paths(self) -> dict[str, str]:
        """Address to read or write (see kv/path.py), of stores that have been connected."""
        return self._members.paths

    @property
    def detail(self) -> str:
        """States and paths, in words."""
        paths = {address: f" ({path})" for address, path in self.paths.items()}
        words = [
            f"{address} {state}{paths.get(address, '')}" for address, state in self.states.items()
        ]
        return f"kvstore: {', '.join(words)}" if words else "no kvstore"

    def follow(self, addresses: Iterable[str]) -> None:
        """Connects to who is new in the background; whoever is missing ends what is under way."""
        self._members.follow(addresses)

    async def start(self) -> None:
        """Returns after the first attempts to connect, in 2.5 s at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_TIMEOUT_S):
                for shard in list(self._shards.shards.values()):
                    await shard.attempted.wait()

    async def until_up(self, timeout_s: float) -> bool:
        """Waits until every store is up; False after timeout_s seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                for shard in list(self._shards.shards.values()):
                    await shard.up.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Lets releases and acknowledgements go out, at most 2 s, then ends the connections."""
        await self._shards.background.close(_CLOSE_TIMEOUT_S)
        await self._members.close()

    async def pull(
        self,
        keys: Sequence[bytes],
        block_ids: Sequence[int],
        *,
        deadline_s: float,
        hold: Hold,
        waits_for_writers: bool = False,
    ) -> PullResult:
        """Brings the longest sealed prefix of keys into the local blocks of the same positions.

        Keys are 32 bytes, parents first. `hold(block_ids, settled)` is called, before this returns
        or raises CancelledError, for local blocks that a late READ may still write.
        waits_for_writers: blocks that are being written belong to the prefix too, if they are
        sealed soon. ValueError: not as many blocks as keys.
        """
        _check_same_len(keys, block_ids)
        if not keys:
            return PullResult(num_blocks=0, failures=())
        pull = Pull(
            shards=self._shards,
            keys=keys,
            block_ids=block_ids,
            deadline=Deadline(deadline_s),
            hold=hold,
            waits_for_writers=waits_for_writers,
        )
        with self._shards.telemetry.tracing.span(spans.PULL) as span:
            result = await pull.run()
            span.set({spans.KEYS: len(keys), spans.BLOCKS: result.num_blocks})
            if result.failures:
                span.set({spans.FAILURES: result.failures})
                span.fail(result.failures[0])
        return result

    def publish(
        self,
        keys: Sequence[bytes],
        *,
        is_private: bool = False,
        tenant: str = "",
        reserve_s: float = RESERVE_S,
    ) -> Publish:
        """For blocks under these keys (32 bytes, parents first): `reserve`, `send`, `close`.

        Local blocks stay unchanged while they are sent; their slots are kept for reserve_s seconds.
        They count for the tenant (`kv.block.tenant_id`).
        """
        return Publish(
            shards=self._shards,
            keys=keys,
            is_private=is_private,
            tenant=tenant,
            reserve_s=reserve_s,
        )

    async def put(
        self,
        keys: Sequence[bytes],
        block_ids: Sequence[int],
        *,
        is_private: bool = False,
        tenant: str = "",
        deadline_s: float,
    ) -> int:
        """Publishes local blocks at once.

        Returns how many of the keys are sealed in the stores now, those of other writers included.
        """
        _check_same_len(keys, block_ids)
        if not keys:
            return 0
        deadline = Deadline(deadline_s)
        publish = self.publish(keys, is_private=is_private, tenant=tenant, reserve_s=deadline_s)
        try:
            await publish.reserve(deadline)
            return await publish.send(0, block_ids, deadline)
        finally:
            publish.close()

    async def discard(self, keys: Sequence[bytes]) -> None:
        """Drops private blocks that nobody will read; best effort."""
        calls = []
        for shard, indices in self._shards.assign(keys):
            for first in range(0, len(indices), MAX_KEYS):
                chunk = [keys[index] for index in indices[first : first + MAX_KEYS]]
                request = kvstore_pb2.DiscardRequest(keys=chunk)
                calls.append(shard.call("Discard", request, RPC_TIMEOUT_S))
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, TROUBLE):
                raise outcome


def _check_same_len(keys: Sequence[bytes], block_ids: Sequence[int]) -> None:
    if len(keys) != len(block_ids):
        raise ValueError(f"block_ids: {len(block_ids)} entries; keys has {len(keys)}")
