"""Drops hand-off tails that no decode rank will read.

Owns short background calls to every kvstore; a store that cannot be reached lets its copy expire.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

from protos import kvstore_pb2, kvstore_pb2_grpc
from services.gateway.instance import Instance

log = logging.getLogger("kvmesh.gateway")

DISCARD_TIMEOUT_S = 2.0


class Stores:
    """The kvstores as the gateway uses them: to discard only."""

    def __init__(self, instances: Sequence[Instance]) -> None:
        self._stubs = [kvstore_pb2_grpc.KvStoreServiceStub(i.channel) for i in instances]
        self._tasks: set[asyncio.Task[None]] = set()

    def discard(self, tail_key: bytes) -> None:
        """Starts dropping a private block, on all stores: it went to one that was live then."""
        if not tail_key:
            return
        for stub in self._stubs:
            task = asyncio.ensure_future(_discard(stub, tail_key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Waits for the calls under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _discard(stub: kvstore_pb2_grpc.KvStoreServiceStub, tail_key: bytes) -> None:
    try:
        await stub.Discard(kvstore_pb2.DiscardRequest(keys=[tail_key]), timeout=DISCARD_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        log.debug("discard failed, the block will expire: %s", error.code())
