"""A worker's view of all kvstores: pull, publish, discard. Local block b lies at b * block_num_bytes.

Owns the shards' connections and the work that outlives a request. Never raises for store trouble: the
store is a cache, and losing it costs only recomputation.
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

__all__ = ["Hold", "KvStoreClient", "PullResult"]

_START_TIMEOUT_S = 2.5
_CLOSE_TIMEOUT_S = 2.0


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
        self._transfer = transfer
        self._open_channel = open_channel
        self._addresses = tuple(dict.fromkeys(addresses))
        self._telemetry = telemetry
        self._runs: list[asyncio.Task[None]] = []
        self._shards = Shards(
            shards=(),
            block_num_bytes=block_num_bytes,
            incarnation=incarnation,
            digest=digest,
            telemetry=telemetry,
            background=Background(),
        )

    @property
    def states(self) -> dict[str, str]:
        """Address to connecting, up or down."""
        return {shard.address: shard.state.value for shard in self._shards.shards}

    async def start(self) -> None:
        """Connects in the background; returns after the first attempts, in 2.5 s at most."""
