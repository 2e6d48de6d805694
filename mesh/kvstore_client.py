"""A worker's view of all kvstores. Local block b lies at b * block_num_bytes of the arena.

Owns the shards' connections and the work that outlives a request. Never raises for store trouble:
the store is a cache, and losing it costs only recomputation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import grpc

from kv.transfer import Transfer
from mesh.channel import open_channel
from mesh.kvstore_publish import Publish
from mesh.kvstore_pull import Hold, Pull, PullResult
from mesh.kvstore_shard import RPC_TIMEOUT_S, Shard
from mesh.kvstore_shards import MAX_KEYS, TROUBLE, Background, Deadline, Shards
from mesh.telemetry import Telemetry
from protos import kvstore_pb2

__all__ = ["Deadline", "Hold", "KvStoreClient", "Publish", "PullResult"]

_START_TIMEOUT_S = 2.5
_CLOSE_TIMEOUT_S = 2.0
RESERVE_S = 120.0
"""So long slots are kept for a prompt that is being computed; then they are asked for anew."""


class KvStoreClient:
    """All shards. `start` on the loop, `close` before the transfer is closed."""

    def __init__(
        self,
        *,
        addresses: list[str],
        transfer: Transfer,
        block_num_bytes: int,
        incarnation: str,
        digest: Callable[[list[int]], Awaitable[list[int]]],
        telemetry: Telemetry,
        open_channel: Callable[[str, Telemetry | None], grpc.aio.Channel] = open_channel,
    ) -> None:
        if block_num_bytes < 1:
            raise ValueError(f"block_num_bytes: {block_num_bytes}; at least 1")
        shards = tuple(
            Shard(address=address, channel=open_channel(address, telemetry), transfer=transfer)
            for address in dict.fromkeys(addresses)
        )
        self._shards = Shards(
            shards=shards,
            block_num_bytes=block_num_bytes,
            incarnation=incarnation,
            digest=digest,
            telemetry=telemetry,
            background=Background(),
        )
        self._runs: list[asyncio.Task[None]] = []

    @property
    def states(self) -> dict[str, str]:
        """Address to connecting, up or down."""
        return {shard.address: shard.state.value for shard in self._shards.shards}

    async def start(self) -> None:
        """Connects in the background; returns after the first attempts, in 2.5 s at most."""
        if not self._shards.shards:
            return
        self._runs = [asyncio.ensure_future(shard.run()) for shard in self._shards.shards]
        attempts = [asyncio.ensure_future(s.attempted.wait()) for s in self._shards.shards]
        _, pending = await asyncio.wait([*attempts], timeout=_START_TIMEOUT_S)
        for attempt in pending:
            attempt.cancel()

    async def until_up(self, timeout_s: float) -> bool:
        """Waits until every store is up; False after timeout_s seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                for shard in self._shards.shards:
                    await shard.up.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Lets releases and acknowledgements go out, at most 2 s, then ends the connections."""
        await self._shards.background.close(_CLOSE_TIMEOUT_S)
        for run in self._runs:
            run.cancel()
        if self._runs:
            await asyncio.wait(self._runs)
        await asyncio.gather(*(shard.close() for shard in self._shards.shards))

    async def pull(
        self, keys: Sequence[bytes], block_ids: Sequence[int], *, deadline_s: float, hold: Hold
    ) -> PullResult:
        """Brings the longest sealed prefix of keys into the local blocks of the same positions.

        Keys are 32 bytes, parents first. `hold(block_ids, settled)` is called, before this returns
        or raises CancelledError, for local blocks that a late READ may still write. ValueError: not
        as many blocks as keys.
        """
        _check_same_len(keys, block_ids)
        started_at = time.monotonic()
        if not keys:
            return PullResult(num_blocks=0, get_s=0.0, failures=())
        pull = Pull(
            shards=self._shards,
            keys=keys,
            block_ids=block_ids,
            deadline=Deadline(deadline_s),
            hold=hold,
        )
        with self._shards.telemetry.tracer.start_as_current_span("kv.get") as span:
            num_blocks = await pull.run()
            span.set_attribute("kvmesh.keys", len(keys))
            span.set_attribute("kvmesh.blocks", num_blocks)
        get_s = time.monotonic() - started_at
        return PullResult(num_blocks=num_blocks, get_s=get_s, failures=tuple(pull.failures))

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
