"""Transfers that copy memory, and fail or hang when a test says so."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from kv.errors import PeerVersionMismatch, TransferError, TransferTimeout
from kv.path import Transport
from kv.transfer import Agent, OnLate

BLOCK = 128
Settled = asyncio.Future[None]


class Network:
    """Arenas by agent name, and what is wrong with the wires."""

    def __init__(self) -> None:
        self.arenas: dict[str, np.ndarray[Any, Any]] = {}
        self.fails = False
        self.hangs = False
        self.late: list[Settled] = []
        self.started = asyncio.Event()
        self.num_moved = 0


class CopyTransfer:
    """A Transfer whose bytes move by memcpy."""

    def __init__(self, network: Network, name: str, num_blocks: int, version: str = "1") -> None:
        self.network = network
        self.arena = np.zeros(num_blocks * BLOCK, dtype=np.uint8)
        network.arenas[name] = self.arena
        self.peers: set[str] = set()
        self._hanging: dict[str, list[Settled]] = {}
        self.agent = Agent(
            name=name,
            nixl_version=version,
            metadata=b"",
            arena_address=0,
            arena_num_bytes=num_blocks * BLOCK,
            incarnation=name,
            host_id="here",
            transports=(Transport.RDMA,),
        )

    async def connect(self, agent: Agent) -> None:
        if agent.nixl_version != self.agent.nixl_version:
            raise PeerVersionMismatch(
                agent.name, ours=self.agent.nixl_version, theirs=agent.nixl_version
            )
        self.peers.add(agent.name)

    async def disconnect(self, name: str) -> None:
        self.peers.discard(name)
        for settled in self._hanging.pop(name, ()):
            if not settled.done():
                settled.set_result(None)

    async def read(
        self,
        peer_name: str,
        local_offsets: Any,
        remote_offsets: Any,
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate | None = None,
    ) -> None:
        await self._wire(peer_name, deadline_s, on_late)
        theirs = self.network.arenas[peer_name]
        for to, origin in zip(local_offsets, remote_offsets, strict=True):
            self.arena[to : to + num_bytes] = theirs[origin : origin + num_bytes]
        self.network.num_moved += len(local_offsets)

    async def write(
        self,
        peer_name: str,
        local_offsets: Any,
        remote_offsets: Any,
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate | None = None,
    ) -> None:
        await self._wire(peer_name, deadline_s, on_late)
        theirs = self.network.arenas[peer_name]
        for origin, to in zip(local_offsets, remote_offsets, strict=True):
            theirs[to : to + num_bytes] = self.arena[origin : origin + num_bytes]
        self.network.num_moved += len(local_offsets)

    def close(self) -> None:
        pass

    async def _wire(self, peer: str, deadline_s: float, on_late: OnLate | None) -> None:
        late = on_late or (lambda settled: None)
        assert peer in self.peers
        self.network.started.set()
        if self.network.fails:
            raise TransferError(peer, "the wire is cut")
        if not self.network.hangs:
            return
        settled: Settled = asyncio.get_running_loop().create_future()
        self.network.late.append(settled)
        self._hanging.setdefault(peer, []).append(settled)
        try:
            await asyncio.wait_for(asyncio.shield(settled), deadline_s)
        except TimeoutError as error:
            late(settled)
            raise TransferTimeout(peer, "hangs", settled) from error
        except asyncio.CancelledError:
            late(settled)
            raise
        raise TransferError(peer, "disconnected")
