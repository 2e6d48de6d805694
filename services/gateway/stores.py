"""Drops hand-off tails that no decode rank will read.

Owns short background calls to every kvstore there is; an unreachable one lets its copy expire.
"""

from __future__ import annotations

import asyncio
import logging

import grpc

from protos import kvstore_pb2, kvstore_pb2_grpc
from services.gateway.router import Router

log = logging.getLogger("kvmesh.gateway")

DISCARD_TIMEOUT_S = 2.0


class Stores:
    """The kvstores as the gateway uses them: to discard only."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._tasks: set[asyncio.Task[None]] = set()

    def discard(self, tail_key: bytes) -> None:
        """Starts dropping a private block, on all stores: it went to one that was live then."""
        if not tail_key:
            return
        for instance in self._router.kvstores:
            stub = kvstore_pb2_grpc.KvStoreServiceStub(instance.channel)
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
