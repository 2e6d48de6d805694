"""A real store and a real client over gRPC that fetch from each other through memcpy.

Owns the server, the client and the wires; what the client holds back is noted in `held`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from mesh.kvstore_client import KvStoreClient, PullResult
from mesh.server import ServiceServer
from mesh.telemetry import Telemetry
from protos import kvstore_pb2_grpc
from services.kvstore.arena import SlotAllocator
from services.kvstore.callers import CallerTable
from services.kvstore.index import BlockIndex
from services.kvstore.servicer import KvStoreServicer
from tests.mesh.fake_kvstore import digest_of, keys_of
from tests.mesh.fake_transfer import BLOCK, CopyTransfer, Network, Settled

NUM_BLOCKS = 64
PATIENCE_S = 20.0


class FetchingStore:
    """Blocks 0 to 3 of the client's arena are published; pulls go to blocks 40 to 43."""

    def __init__(self) -> None:
        self.network = Network()
        self.worker = CopyTransfer(self.network, "worker", NUM_BLOCKS)
        self.transfer = CopyTransfer(self.network, "store", NUM_BLOCKS)
        self.now = 50.0
        self._port = 0
        self.held: list[tuple[list[int], Settled]] = []
        self.telemetry = Telemetry.off()

    async def serve(self) -> None:
        """A life of the store, always at one address."""
        self.index = BlockIndex(SlotAllocator(NUM_BLOCKS * BLOCK), clock=lambda: self.now)
        self.servicer = KvStoreServicer(
            index=self.index,
            callers=CallerTable(clock=lambda: self.now),
            transfer=self.transfer,
            telemetry=self.telemetry,
        )
        self.server = ServiceServer(host="127.0.0.1", port=self._port, telemetry=self.telemetry)
        register = kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server
        self.server.add(register, self.servicer, "kvmesh.v1.KvStoreService")
        self._port = await self.server.start()
        self.address = f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Serves, connects on the WRITE path and publishes."""
        await self.serve()
        self.client = KvStoreClient(
            transfer=self.worker,
            block_num_bytes=BLOCK,
            incarnation="worker",
            digest=self.digest,
            telemetry=self.telemetry,
            path="write",
        )
        self.client.follow([self.address])
        assert await self.client.until_up(PATIENCE_S)
        data = np.random.default_rng(1).integers(0, 256, 4 * BLOCK, np.uint8)
        self.worker.arena[: 4 * BLOCK] = data
        assert await self.client.put(keys_of(4), range(4), deadline_s=PATIENCE_S) == 4

    async def pull(self, deadline_s: float = PATIENCE_S) -> PullResult:
        """Of all that was published."""
        hold: Any = lambda block_ids, settled: self.held.append((block_ids, settled))  # noqa: E731
        return await self.client.pull(keys_of(4), range(40, 44), deadline_s=deadline_s, hold=hold)

    def has_arrived(self) -> bool:
        """Whether the pulled blocks are those that were published."""
        arena = self.worker.arena
        return arena[40 * BLOCK : 44 * BLOCK].tobytes() == arena[: 4 * BLOCK].tobytes()

    async def digest(self, block_ids: list[int]) -> list[int]:
        """As a worker's."""
        blocks = [self.worker.arena[b * BLOCK : (b + 1) * BLOCK] for b in block_ids]
        return [digest_of(block) for block in blocks]

    async def until(self, condition: Callable[[], object]) -> None:
        """Turns the loop until a condition holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - what is awaited has no event
                await asyncio.sleep(0)

    async def close(self) -> None:
        """Nothing may be left of what the client did."""
        await self.client.close()
        await self.server.stop(0)
        self.index.check()
        assert not self.index.leases.uses and not self.index.counts().num_leases
