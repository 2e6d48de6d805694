"""Blocks that a store WRITEs here, where a READ would not be one-sided (kv/path.py).

Owns the calls that outlive who made them, and the moment from which nothing of one can land any
more. Never retries, never reconnects: it says that the path is broken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc

from kv.errors import TransferError, TransferTimeout
from kv.transfer import OnLate, Transfer, spans
from mesh.errors import from_rpc_error
from mesh.kvstore_connection import Connection
from protos import kvstore_pb2, kvstore_pb2_grpc

_ANSWER_S = 2.0  # beyond the deadline, at which the store ends its WRITE
# No lease lives longer, and a store begins no WRITE without one, however long it was frozen.
_LAST_START_S = 300.0
# What a store has sent is here or lost after UCX_TCP_USER_TIMEOUT (kv/nixl_transfer.py), 5 s.
_LANDING_S = 6.0
_REFUSALS = (  # the store's own answers: it has written nothing
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
)
_OVER = (
    kvstore_pb2.FetchResponse.OUTCOME_WRITTEN,
    kvstore_pb2.FetchResponse.OUTCOME_EXPIRED,  # as Release will say
)


class Fetches:
    """Fetch calls to one store; `on_broken(reason)` is to have it connected anew."""

    def __init__(
        self,
        *,
        stub: kvstore_pb2_grpc.KvStoreServiceStub,
        transfer: Transfer,
        on_broken: Callable[[str], None],
    ) -> None:
        self._stub = stub
        self._transfer = transfer
        self._on_broken = on_broken
        self._late: set[asyncio.Task[None]] = set()

    async def fetch(
        self,
        connection: Connection,
        lease_id: int,
        local: Sequence[int],
        remote: Sequence[int],
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate,
    ) -> None:
        """Brings the lease's first blocks, which lie at `remote`. Errors as in Transfer.read."""
        spans(
            local,
            remote,
            num_bytes,
            local_num_bytes=self._transfer.agent.arena_num_bytes,
            remote_num_bytes=connection.agent.arena_num_bytes,
        )
        request = kvstore_pb2.FetchRequest(
            incarnation=self._transfer.agent.incarnation,
            lease_id=lease_id,
            local_offsets=local,
            deadline_s=deadline_s,
            life=connection.agent.name,
        )
        call = asyncio.ensure_future(self._call(connection, request, deadline_s + _ANSWER_S))
        try:
            await asyncio.wait([call], timeout=deadline_s)
        except asyncio.CancelledError:
            self._leave(call, connection, on_late)
            raise
        if call.done() and not call.cancelled() and call.result():
            return
        reason = "the Fetch broke" if call.done() else f"Fetch not over after {deadline_s:.3f} s"
        settled = self._leave(call, connection, on_late)
        raise TransferTimeout(connection.agent.name, reason, settled)

    async def _call(
        self, connection: Connection, request: kvstore_pb2.FetchRequest, timeout_s: float
    ) -> bool:
        """Whether it is over for good. TransferError: refused, and over."""
        try:
            response = await self._stub.Fetch(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as failure:
            if failure.code() in _REFUSALS:
                error = from_rpc_error(failure)
                raise TransferError(connection.agent.name, f"Fetch: {error}") from failure
            return False
        return response.outcome in _OVER

    def _leave(
        self, call: asyncio.Task[bool], connection: Connection, on_late: OnLate
    ) -> asyncio.Future[None]:
        """Lets a call go on alone; the future resolves when nothing of it can land any more."""
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(self._settle(call, connection, settled))
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        on_late(settled)
        return settled

    async def _settle(
        self, call: asyncio.Task[bool], connection: Connection, settled: asyncio.Future[None]
    ) -> None:
        await asyncio.wait([call])
        is_over = not call.cancelled() and (call.exception() is not None or call.result())
        if not is_over:
            await self._until_cut(connection)
            await asyncio.sleep(_LANDING_S)
        settled.set_result(None)

    async def _until_cut(self, connection: Connection) -> None:
        """Until the store has told a new Connect that nothing goes on, or has another life."""
        if not connection.is_cut.is_set():
            self._on_broken("a Fetch broke")
        try:
            async with asyncio.timeout(_LAST_START_S):
                await connection.is_cut.wait()
        except TimeoutError:
            await connection.cut_off()
