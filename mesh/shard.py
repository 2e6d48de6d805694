"""One kvstore shard as a worker sees it: connection state and the calls.

Owns the handshake and its repetition in the background; a shard that is down costs a request nothing.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Sequence

import grpc

from kv.errors import TransferError
from kv.transfer import Agent, Transfer
from mesh.errors import FailedPrecondition, KvmeshError, from_rpc_error
from protos import kvstore_pb2, kvstore_pb2_grpc

CALL_TIMEOUT_S = 2.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.2, 2.0
log = logging.getLogger("kvmesh.kvstore")


class ShardState(enum.Enum):
    """Whether a shard can be asked."""

    CONNECTING = "connecting"
    UP = "up"
    REFUSED = "refused"


class ShardDown(Exception):
    """The shard cannot serve this call; the request goes on without it."""


class Shard:
    """Connection to one store address; reconnects when the store comes back under a new incarnation."""

    def __init__(
        self,
        *,
        address: str,
        transfer: Transfer,
        open_channel: Callable[[str], grpc.aio.Channel],
    ) -> None:
        self.address = address
        self.state = ShardState.CONNECTING
        self.peer = ""
        self._transfer = transfer
        self._channel = open_channel(address)
        self._stub = kvstore_pb2_grpc.KvStoreServiceStub(self._channel)
        self._lost = asyncio.Event()
        self._lost.set()
        self._first_try = asyncio.Event()
        self._task = asyncio.ensure_future(self._keep_connected())

    async def first_try(self, timeout_s: float) -> None:
        """Waits until the first handshake ended, well or not."""
        await asyncio.wait([asyncio.ensure_future(self._first_try.wait())], timeout=timeout_s)

    async def call(self, method: str, request: object) -> object:
        """One RPC; ShardDown when the shard is down, refuses us or does not answer in time."""
        if self.state is not ShardState.UP:
            raise ShardDown(f"{self.address} is {self.state.value}")
        try:
            return await getattr(self._stub, method)(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if isinstance(error, FailedPrecondition) or error.code in _LOST:
                self.lose(str(error))
            raise ShardDown(f"{self.address}: {error}") from rpc_error

    def lose(self, why: str) -> None:
        """Marks the shard down; the background task connects again."""
        if self.state is ShardState.UP:
            log.warning("kvstore %s lost: %s", self.address, why)
        self.state = ShardState.CONNECTING
        self._lost.set()

    async def close(self) -> None:
        """Stops reconnecting and closes the channel."""
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._channel.close()

    async def _keep_connected(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            await self._lost.wait()
            self._lost.clear()
            try:
                await self._connect()
                pause = _FIRST_PAUSE_S
            except (KvmeshError, TransferError, grpc.RpcError) as error:
                log.debug("kvstore %s: %s", self.address, error)
                self._lost.set()
                self._first_try.set()
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE_S)
            self._first_try.set()

    async def _connect(self) -> None:
        if self.peer:
            await self._transfer.disconnect(self.peer)
            self.peer = ""
        ours = self._transfer.agent
        response = await self._stub.Connect(
            kvstore_pb2.ConnectRequest(agent=agent_message(ours)), timeout=CALL_TIMEOUT_S
        )
        theirs = agent_value(response.agent)
        await self._transfer.connect(theirs)
        self.peer = theirs.name
        self.state = ShardState.UP
        log.info("kvstore %s connected (incarnation %s)", self.address, theirs.incarnation)


_LOST: Sequence[grpc.StatusCode] = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


def agent_message(agent: Agent) -> kvstore_pb2.Agent:
    """The wire's agent."""
    return kvstore_pb2.Agent(
        name=agent.name,
        nixl_version=agent.nixl_version,
        metadata=agent.metadata,
        arena_address=agent.arena_address,
        arena_num_bytes=agent.arena_num_bytes,
        incarnation=agent.incarnation,
        host_id=agent.host_id,
    )


def agent_value(message: kvstore_pb2.Agent) -> Agent:
    """The agent behind a wire message."""
    return Agent(
        name=message.name,
        nixl_version=message.nixl_version,
        metadata=message.metadata,
        arena_address=message.arena_address,
        arena_num_bytes=message.arena_num_bytes,
        incarnation=message.incarnation,
        host_id=message.host_id,
    )
