"""One kvstore as a worker sees it: its connection, and whether it is worth asking.

Owns the channel, the NIXL peer and the loop that reconnects in the background. A shard that fails
is down at once: nobody waits for it until Connect has answered. Never retries a caller's request.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kv.errors import TransferError, TransferTimeout
from kv.path import KvPath, choose
from kv.transfer import Agent, OnLate, Transfer
from mesh.errors import DeadlineExceeded, KvmeshError, Unavailable, from_rpc_error
from mesh.kvstore_agent import agent_from_wire, agent_to_wire
from mesh.kvstore_connection import Connection
from mesh.kvstore_fetch import Fetches
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

    def __init__(
        self, *, address: str, channel: grpc.aio.Channel, transfer: Transfer, path: str = "auto"
    ) -> None:
        """path: one of kv.path.PATH_CHOICES."""
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
        self._wanted_path = path
        self._connection: Connection | None = None
        self._fetches = Fetches(
            stub=self._stub,
            transfer=transfer,
            on_broken=functools.partial(self._lose, is_path_broken=True),
        )
        self._is_path_broken = False
        self._lost = asyncio.Event()
        self._reason = ""

    @property
    def arena_num_bytes(self) -> int:
        """Length of the store's arena; 0 before the first connection."""
        return self._connection.agent.arena_num_bytes if self._connection else 0

    @property
    def life(self) -> str:
        """Which life of the store is connected: slots and leases are that life's alone."""
        return self._connection.agent.name if self._connection else ""

    @property
    def path(self) -> KvPath | None:
        """How `read` brings blocks here; None before the first connection."""
        return self._connection.path if self._connection else None

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
        connection, timeout_s = self._connection, min(deadline_s, RPC_TIMEOUT_S)
        try:
            with self.uses.held():
                return await getattr(self._stub, name)(request, timeout=max(0.0, timeout_s))
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
            is_ours = connection is self._connection
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
        lease_id: int,
    ) -> None:
        """Brings the first blocks of a lease of this life of the store, on the connection's path.

        TransferError as in Transfer.read.
        """
        connection = self._connection

        def move(on_late: OnLate) -> Awaitable[None]:
            args = (local, remote, num_bytes, deadline_s, on_late)
            if connection is not None and connection.path is KvPath.WRITE:
                return self._fetches.fetch(connection, lease_id, *args)
            return self._transfer.read(life, *args)

        await self._move(move, deadline_s, on_late, life)

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

        def move(on_late: OnLate) -> Awaitable[None]:
            return self._transfer.write(life, local, remote, num_bytes, deadline_s, on_late)

        await self._move(move, deadline_s, on_late, life)

    async def disconnect(self, *, keeps_peer: bool = False) -> None:
        """Ends its transfers; calls of `even_down` still go out. `run` must have ended.

        keeps_peer: another shard transfers with the same life of the store.
        """
        self.state = ShardState.DOWN
        connection, self._connection = self._connection, None
        if connection is not None and not keeps_peer:
            await connection.cut_off()

    async def close(self) -> None:
        """Forgets the store; `run` must have ended."""
        await self.disconnect()
        self._is_closed = self.has_left = True
        await self._channel.close()

    async def _move(
        self,
        move: Callable[[OnLate], Awaitable[None]],
        deadline_s: float,
        on_late: OnLate,
        life: str,
    ) -> None:
        connection = self._connection
        if connection is None or self.state is not ShardState.UP:
            raise TransferError(self.address, self.state.value)
        if connection.agent.name != life:
            raise TransferError(self.address, "restarted since it granted this")

        def pin_late(settled: asyncio.Future[None]) -> None:
            self.uses.add()
            settled.add_done_callback(lambda _: self.uses.drop())
            on_late(settled)

        try:
            with self.uses.held():
                await move(pin_late)
        except TransferError as error:
            is_slow = isinstance(error, TransferTimeout) and deadline_s < _HUNG_S
            if connection is self._connection and not is_slow:
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
        connection = await self._connection_to(agent)
        self._connection = connection  # before it is loaded: what is cut short is unloaded, too
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                await self._transfer.connect(agent)
        except (TransferError, TimeoutError) as error:
            self._explain(str(error) or "NIXL did not answer")
            self._is_path_broken = True
        if self._is_path_broken:
            self.state = ShardState.DOWN
            return False
        self._lost.clear()
        self.state = ShardState.UP
        self._reason = ""
        self.up.set()
        log.info(
            "kvstore %s: up (%s), incarnation %s", self.address, connection.path, agent.incarnation
        )
        return True

    async def _connection_to(self, agent: Agent) -> Connection:
        """The NIXL peer that is there serves on, unless it is of another life or broken."""
        old, transfer = self._connection, self._transfer
        if old is not None and old.agent.name == agent.name and not self._is_path_broken:
            return Connection(agent=agent, path=old.path, transfer=transfer, after=old)
        self._is_path_broken = False  # first: it may break again meanwhile
        if old is not None:
            await old.cut_off()
        path = choose(self._wanted_path, transfer.agent, agent)
        return Connection(agent=agent, path=path, transfer=transfer)

    async def _exchange(self) -> Agent | None:
        request = kvstore_pb2.ConnectRequest(agent=agent_to_wire(self._transfer.agent))
        try:
            response = await self._stub.Connect(request, timeout=RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            self._explain(f"Connect: {from_rpc_error(failure)}")
            return None
        return agent_from_wire(response.agent)

    def _explain(self, reason: str) -> None:
        """Logs a loss once, not at every attempt."""
        if not self._reason:
            log.warning("kvstore %s: down: %s", self.address, reason)
        self._reason = reason


def _is_loss(error: KvmeshError, *, had_full_time: bool) -> bool:
    if isinstance(error, DeadlineExceeded):
        return had_full_time
    return isinstance(error, Unavailable) or error.reason == UNKNOWN_INCARNATION
