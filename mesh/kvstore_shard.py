"""One kvstore as a worker sees it: its connection, and whether it is worth asking.

Owns the channel, the NIXL peer and the loop that reconnects in the background. A shard that fails
is down at once: nobody waits for it until Connect has answered. Never retries a caller's request.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kv.errors import TransferError, TransferTimeout
from kv.transfer import Agent, OnLate, Transfer
from mesh.errors import DeadlineExceeded, KvmeshError, Unavailable, from_rpc_error
from mesh.uses import Uses
from protos import kvstore_pb2, kvstore_pb2_grpc

log = logging.getLogger("kvmesh.kvstore")

RPC_TIMEOUT_S = 2.0
MAX_KEYS = 4096  # and ids, in one request
TROUBLE = (KvmeshError, TransferError)  # what a store may raise
UNKNOWN_INCARNATION = "UNKNOWN_INCARNATION"
_OPENING = ("Lookup", "Reserve")  # calls that give leases and slots
FIRST_BACK_OFF_S, LAST_BACK_OFF_S = 0.2, 2.0
_STABLE_S = 10.0  # up for this long: the next loss starts with a short back-off again
_HEARTBEAT_S = 1.0
_HUNG_S = 1.0  # a transfer that had at least this long and is not over: the data path hangs


class ShardState(enum.Enum):
    """Whether a shard is asked."""

    CONNECTING = "connecting"
    UP = "up"
    DOWN = "down"


class Shard:
    """One store. Run `run` as a task; `call`, `read` and `write` fail fast while it is not up."""

    def __init__(self, *, address: str, channel: grpc.aio.Channel, transfer: Transfer) -> None:
        self.address = address
        self.state = ShardState.CONNECTING
        self.attempted = asyncio.Event()
        self.up = asyncio.Event()
        self.uses = Uses()  # calls, transfers, leases and slots: the connection serves them still
        self.has_left = False  # no member any more: nothing new is asked of it
        self._is_closed = False
        self._channel = channel
        self._stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        self._transfer = transfer
        self._peer: Agent | None = None
        self._is_path_broken = False
        self._lost = asyncio.Event()
        self._reason = ""

    @property
    def arena_num_bytes(self) -> int:
        """Length of the store's arena; 0 before the first connection."""
        return self._peer.arena_num_bytes if self._peer else 0

    @property
    def life(self) -> str:
        """Which life of the store is connected: slots and leases are that life's alone."""
        return self._peer.name if self._peer else ""

    async def run(self) -> None:
        """Connects, waits for a loss, backs off, for ever. The back-off bounds peer changes too."""
        back_off_s = FIRST_BACK_OFF_S
        while True:
            if await self._connect():
                self.attempted.set()
                up_at = time.monotonic()
                await self._watch()
                if time.monotonic() - up_at > _STABLE_S:
                    back_off_s = FIRST_BACK_OFF_S
            self.attempted.set()
            await asyncio.sleep(back_off_s)
            back_off_s = min(LAST_BACK_OFF_S, 2 * back_off_s)

    async def _watch(self) -> None:
        """Returns when the store is lost. Asks it now and then: a frozen one is noticed by this
        worker before a request has to.
        """
        health = health_pb2_grpc.HealthStub(self._channel)
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEARTBEAT_S):  # wait_for swallows a cancellation
                    await self._lost.wait()
                    return
            try:
                await health.Check(  # pyright: ignore[reportAttributeAccessIssue]
                    health_pb2.HealthCheckRequest(), timeout=RPC_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
                if _is_loss(error, had_full_time=True):
                    self._lose(f"heartbeat: {error}", is_path_broken=False)

    async def call(
        self, name: str, request: Any, deadline_s: float, *, even_down: bool = False
    ) -> Any:
        """One RPC, bounded by RPC_TIMEOUT_S. KvmeshError on any failure."""
        if self.state is not ShardState.UP and not even_down:
            raise Unavailable(
                f"kvstore {self.address} is {self.state.value}", reason="KVSTORE_DOWN"
            )
        # Whoever chose this shard just before it left: what it granted now would be lost.
        if self._is_closed or (self.has_left and name in _OPENING):
            raise Unavailable(f"kvstore {self.address} has left", reason="KVSTORE_DOWN")
        peer, timeout_s = self._peer, min(deadline_s, RPC_TIMEOUT_S)
        try:
            with self.uses.held():
                return await getattr(self._stub, name)(request, timeout=max(0.0, timeout_s))
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
            is_ours = peer is self._peer
            if is_ours and _is_loss(error, had_full_time=timeout_s >= RPC_TIMEOUT_S):
                self._lose(f"{name}: {error}", is_path_broken=False)
            raise error from failure

    async def read(
        self,
        local: Sequence[int],
        remote: Sequence[int],
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate,
        *,
        life: str,
    ) -> None:
        """NIXL READ from this life of the store. TransferError as in Transfer.read."""
        move = self._transfer.read
        await self._move(move, local, remote, num_bytes, deadline_s, on_late, life)

    async def write(
        self,
        local: Sequence[int],
        remote: Sequence[int],
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate,
        *,
        life: str,
    ) -> None:
        """NIXL WRITE into this life of the store. TransferError as in Transfer.write."""
        move = self._transfer.write
        await self._move(move, local, remote, num_bytes, deadline_s, on_late, life)

    async def disconnect(self, *, keeps_peer: bool = False) -> None:
        """Ends its transfers; calls of `even_down` still go out. `run` must have ended.

        keeps_peer: another shard transfers with the same life of the store.
        """
        self.state = ShardState.DOWN
        peer, self._peer = self._peer, None
        if peer is not None and not keeps_peer:
            await self._disconnect(peer)

    async def close(self) -> None:
        """Forgets the store; `run` must have ended."""
        await self.disconnect()
        self._is_closed = self.has_left = True
        await self._channel.close()

    async def _move(
        self,
        move: Callable[..., Any],
        local: Sequence[int],
        remote: Sequence[int],
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate,
        life: str,
    ) -> None:
        peer = self._peer
        if peer is None or self.state is not ShardState.UP:
            raise TransferError(self.address, self.state.value)
        if peer.name != life:
            raise TransferError(self.address, "restarted since it granted this")

        def pin_late(settled: asyncio.Future[None]) -> None:
            self.uses.add()
            settled.add_done_callback(lambda _: self.uses.drop())
            on_late(settled)

        try:
            with self.uses.held():
                await move(peer.name, local, remote, num_bytes, deadline_s, pin_late)
        except TransferError as error:
            is_slow = isinstance(error, TransferTimeout) and deadline_s < _HUNG_S
            if peer is self._peer and not is_slow:
                self._lose(str(error), is_path_broken=True)
            raise

    def _lose(self, reason: str, *, is_path_broken: bool) -> None:
        self._is_path_broken = self._is_path_broken or is_path_broken
        if self.state is ShardState.UP:
            self.state = ShardState.DOWN
            self.up.clear()
            self._explain(reason)
            self._lost.set()

    async def _connect(self) -> bool:
        agent = await self._exchange()
        if agent is None:
            self.state = ShardState.DOWN
            return False
        old = self._peer
        if old is not None and (old.name != agent.name or self._is_path_broken):
            self._peer = None
            await self._disconnect(old)
        self._peer = agent  # before it is loaded: what is cut short here is unloaded, too
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                await self._transfer.connect(agent)
        except (TransferError, TimeoutError) as error:
            self.state = ShardState.DOWN
            self._explain(str(error) or "NIXL did not answer")
            return False
        self._is_path_broken = False
        self._lost.clear()
        self.state = ShardState.UP
        self._reason = ""
        self.up.set()
        log.info("kvstore %s: up, incarnation %s", self.address, agent.incarnation)
        return True

    async def _exchange(self) -> Agent | None:
        request = kvstore_pb2.ConnectRequest(agent=agent_to_wire(self._transfer.agent))
        try:
            response = await self._stub.Connect(request, timeout=RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            self._explain(f"Connect: {from_rpc_error(failure)}")
            return None
        return agent_from_wire(response.agent)

    async def _disconnect(self, peer: Agent) -> None:
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                await self._transfer.disconnect(peer.name)
        except (TransferError, TimeoutError) as error:
            log.debug("kvstore %s: disconnect: %s", self.address, error)

    def _explain(self, reason: str) -> None:
        """Logs a loss once, not at every attempt."""
        if not self._reason:
            log.warning("kvstore %s: down: %s", self.address, reason)
        self._reason = reason


def _is_loss(error: KvmeshError, *, had_full_time: bool) -> bool:
    if isinstance(error, DeadlineExceeded):
        return had_full_time
    return isinstance(error, Unavailable) or error.reason == UNKNOWN_INCARNATION


def agent_to_wire(agent: Agent) -> kvstore_pb2.Agent:
    """The message that carries an agent."""
    return kvstore_pb2.Agent(
        name=agent.name,
        nixl_version=agent.nixl_version,
        metadata=agent.metadata,
        arena_address=agent.arena_address,
        arena_num_bytes=agent.arena_num_bytes,
        incarnation=agent.incarnation,
        host_id=agent.host_id,
    )


def agent_from_wire(message: kvstore_pb2.Agent) -> Agent:
    """The agent a message carries; `Transfer.connect` checks it."""
    return Agent(
        name=message.name,
        nixl_version=message.nixl_version,
        metadata=message.metadata,
        arena_address=message.arena_address,
        arena_num_bytes=message.arena_num_bytes,
        incarnation=message.incarnation,
        host_id=message.host_id,
    )
