"""The Transfer protocol over a backend that must be called from one thread: the asyncio half.

Owns peers, deadlines and futures. Never blocks the event loop and never calls the backend itself; a
transfer that outlives its deadline goes on in the owner thread until it is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kv.errors import PeerVersionMismatch, TransferError, TransferTimeout
from kv.transfer import Agent, OnLate, Positions, Spans, group, spans
from kv.transfer_thread import Backend, Flight, TransferThread

log = logging.getLogger("kvmesh.transfer")

PART_NUM_BYTES = 32 * 2**20
"""Least bytes of a request but the last: with one span on top, at most 64 MiB."""
_CLOSE_TIMEOUT_S = 5.0


class ThreadTransfer:
    """A Transfer whose backend lives in a TransferThread that has been started."""

    def __init__(
        self,
        *,
        agent: Agent,
        backend: Backend,
        thread: TransferThread,
        loop: asyncio.AbstractEventLoop,
        part_num_bytes: int = PART_NUM_BYTES,
    ) -> None:
        """part_num_bytes: a transfer that is given up stops after the requests that are posted."""
        self._part_num_bytes = part_num_bytes
        self._agent = agent
        self._backend = backend
        self._thread = thread
        self._loop = loop
        self._peers: dict[str, Agent] = {}
        self._num_late = 0
        self._is_closed = False

    @property
    def num_late(self) -> int:
        """Transfers that outlived their deadline or their caller and are not over yet."""
        return self._num_late

    @property
    def agent(self) -> Agent:
        """This process's agent."""
        return self._agent

    async def connect(self, agent: Agent) -> None:
        """See Transfer.connect. A peer that is connected already is left as it is."""
        if agent.nixl_version != self._agent.nixl_version:
            raise PeerVersionMismatch(
                agent.name, ours=self._agent.nixl_version, theirs=agent.nixl_version
            )
        if agent.arena_address + agent.arena_num_bytes > 2**64:
            raise TransferError(agent.name, "its arena passes the end of the address space")
        if agent.name in self._peers:
            return
        self._peers[agent.name] = agent
        try:
            await self._call(lambda: self._backend.add_peer(agent))
        except TransferError:
            del self._peers[agent.name]
            raise

    async def disconnect(self, name: str) -> None:
        """See Transfer.disconnect."""
        if self._peers.pop(name, None) is not None:
            await self._call(lambda: self._backend.remove_peer(name))

    async def read(
        self,
        peer_name: str,
        local_offsets: Positions,
        remote_offsets: Positions,
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate | None = None,
    ) -> None:
        """See Transfer.read."""
        runs = self._spans(peer_name, local_offsets, remote_offsets, num_bytes)
        await self._move("READ", peer_name, runs, deadline_s, on_late)

    async def write(
        self,
        peer_name: str,
        local_offsets: Positions,
        remote_offsets: Positions,
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate | None = None,
    ) -> None:
        """See Transfer.write."""
        runs = self._spans(peer_name, local_offsets, remote_offsets, num_bytes)
        await self._move("WRITE", peer_name, runs, deadline_s, on_late)

    def close(self) -> None:
        """Ends the agent; transfers still in flight end with TransferError. Waits 5 s at most."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self._thread.close(_CLOSE_TIMEOUT_S):
            log.warning("the transfer thread did not end in %.0f s; left behind", _CLOSE_TIMEOUT_S)

    def _spans(
        self,
        peer_name: str,
        local_offsets: Positions,
        remote_offsets: Positions,
        num_bytes: int,
    ) -> Spans:
        peer = self._peers.get(peer_name)
        if peer is None:
            raise TransferError(peer_name, "not connected")
        return spans(
            local_offsets,
            remote_offsets,
            num_bytes,
            local_num_bytes=self._agent.arena_num_bytes,
            remote_num_bytes=peer.arena_num_bytes,
        )

    async def _move(
        self, operation: str, peer: str, runs: Spans, deadline_s: float, on_late: OnLate | None
    ) -> None:
        if len(runs) == 0:
            return
        if self._is_closed:
            raise TransferError(peer, "this agent was closed")
        over: asyncio.Future[TransferError | None] = self._loop.create_future()
        flight = Flight(
            operation=operation,
            peer=peer,
            parts=group(runs, self._part_num_bytes),
            on_over=lambda error: self._post_result(over, error),
        )
        self._thread.submit(flight)
        try:
            await asyncio.wait([over], timeout=deadline_s)
        except asyncio.CancelledError:
            self._leave(flight, over, on_late)
            raise
        if not over.done():
            settled = self._leave(flight, over, on_late)
            raise TransferTimeout(peer, f"{operation} not over after {deadline_s:.3f} s", settled)
        error = over.result()
        if error is not None:
            raise error

    def _leave(
        self,
        flight: Flight,
        over: asyncio.Future[TransferError | None],
        on_late: OnLate | None,
    ) -> asyncio.Future[None]:
        """Lets a flight go on alone; the future resolves when it is over."""
        flight.abandon()
        settled: asyncio.Future[None] = self._loop.create_future()
        if over.done():
            settled.set_result(None)
            return settled
        self._num_late += 1

        def settle(_: object) -> None:
            self._num_late -= 1
            if not settled.done():
                settled.set_result(None)

        over.add_done_callback(settle)
        if on_late is not None:
            on_late(settled)
        return settled

    async def _call(self, function: Callable[[], None]) -> None:
        """Runs a function of the backend in the owner thread and waits for it."""
        if self._is_closed:
            raise TransferError(self._agent.name, "this agent was closed")
        over: asyncio.Future[TransferError | None] = self._loop.create_future()

        def run() -> None:
            try:
                function()
            except TransferError as error:
                self._post_result(over, error)
            else:
                self._post_result(over, None)

        self._thread.call(run)
        error = await asyncio.shield(over)
        if error is not None:
            raise error

    def _post_result(
        self, over: asyncio.Future[TransferError | None], error: TransferError | None
    ) -> None:
        """Called in the owner thread."""

        def resolve() -> None:
            if not over.done():
                over.set_result(error)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(resolve)
