"""This gateway's stream to one decode rank.

Owns the stream's life (kept open, reopened with back-off) and the table of requests on it.
Dispatches a step's outputs in one pass; never waits for a client and never touches tokens itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import grpc

from mesh.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    KvmeshError,
    ResourceExhausted,
    Unavailable,
    from_rpc_error,
)
from protos import decode_pb2, decode_pb2_grpc
from services.gateway.instance import Instance

log = logging.getLogger("kvmesh.gateway")

SessionCall: TypeAlias = (
    "grpc.aio.StreamStreamCall[decode_pb2.SessionRequest, decode_pb2.SessionResponse]"
)
END = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue] - grpcio's types lack it
MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 1.0
_REJECTIONS: Mapping[int, type[KvmeshError]] = {
    kind.code.value[0]: kind
    for kind in (InvalidArgument, FailedPrecondition, ResourceExhausted, Unavailable, Internal)
}


class Mailbox(Protocol):
    """Where a request's answers from a rank go. Its methods must not block."""

    def on_admitted(self, admitted: decode_pb2.Admitted) -> None:
        """The request's KV is in place."""
        ...

    def on_output(self, output: decode_pb2.SequenceOutput) -> None:
        """New tokens of one sequence."""
        ...

    def on_failure(self, error: KvmeshError) -> None:
        """The rank refused or is gone; nothing follows."""
        ...


class RankSession:
    """One bidirectional stream, reopened for ever until `close`."""

    def __init__(self, instance: Instance, *, on_change: Callable[[], None]) -> None:
        self.instance = instance
        self._stub = decode_pb2_grpc.DecodeServiceStub(instance.channel)
        self._on_change = on_change
        self._handles = itertools.count(1)
        self._mailboxes: dict[int, Mailbox] = {}
        self._prefetches: set[int] = set()  # handles on this stream that are not admitted yet
        self._commands: asyncio.Queue[decode_pb2.SessionRequest] = asyncio.Queue()
        self._is_open = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether requests can be admitted now."""
        return self._is_open

    @property
    def num_requests(self) -> int:
        """Requests on the stream, prefetched ones included."""
        return len(self._mailboxes) + len(self._prefetches)

    def start(self) -> None:
        """Begins opening the stream."""
        self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Ends the stream; the rank drops what was on it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def prefetch(self, command: decode_pb2.Prefetch) -> int:
        """Lets the rank pull ahead; returns the handle. Raises Unavailable without a stream."""
        handle = command.handle = self._new_handle()
        self._prefetches.add(handle)
        self._commands.put_nowait(decode_pb2.SessionRequest(prefetch=command))
        return handle

    def has_prefetch(self, handle: int) -> bool:
        """Whether this stream is still the one on which that prefetch was sent."""
        return handle in self._prefetches

    def admit(
        self, admit: decode_pb2.Admit, mailbox: Mailbox, prefetched: int | None = None
    ) -> int:
        """Sends a request to the rank, under the handle of its prefetch if there is one; returns
        the handle. Raises Unavailable without a stream.
        """
        handle = admit.handle = self._new_handle() if prefetched is None else prefetched
        self._prefetches.discard(handle)
        self._mailboxes[handle] = mailbox
        self._commands.put_nowait(decode_pb2.SessionRequest(admit=admit))
        return handle

    def cancel(self, handle: int, sequence_index: int | None = None) -> None:
        """Ends one sequence at the rank, or the request, of which nothing is heard any more."""
        if handle not in self._mailboxes and handle not in self._prefetches:
            return
        if sequence_index is None:
            self.forget(handle)
        cancel = decode_pb2.Cancel(handle=handle, sequence_index=sequence_index)
        self._commands.put_nowait(decode_pb2.SessionRequest(cancel=cancel))

    def forget(self, handle: int) -> None:
        """The rank has finished the request."""
        self._mailboxes.pop(handle, None)
        self._prefetches.discard(handle)

    def _new_handle(self) -> int:
        if not self._is_open:
            raise self._lost("the session is not open")
        return next(self._handles)

    async def _run(self) -> None:
        backoff_s = MIN_BACKOFF_S
        while True:
            was_open = await self._hold_stream()
            backoff_s = MIN_BACKOFF_S if was_open else min(2 * backoff_s, MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s)

    async def _hold_stream(self) -> bool:
        """Opens the stream and reads it to its end; returns whether it was ever open."""
        self._commands = asyncio.Queue()
        call = self._stub.Session()
        # A loss cancels the reading, not the call: grpc's wait for a connection never ends when its
        # call is cancelled under it, and the rank would be lost for ever.
        reading = asyncio.ensure_future(self._read(call))
        losses: list[str] = []

        def reset(reason: str) -> None:
            losses.append(reason)
            reading.cancel()

        error = self._lost("the gateway closed the session")
        try:
            with self.instance.when_lost(reset):
                await asyncio.wait({reading})
            why = _end_of(reading)
            error = self._lost(losses[0] if losses else why)
        finally:
            reading.cancel()
            call.cancel()
            was_open = self._is_open
            self._end(error)
        return was_open

    async def _read(self, call: SessionCall) -> None:
        """Waits for the connection, then takes all that the rank says."""
        await call.wait_for_connection()
        self._is_open = True
        log.info("session with %s is open", self.instance.address)
        self._on_change()
        writer = asyncio.ensure_future(_write(call, self._commands))
        try:
            while (response := await call.read()) is not END:
                self._dispatch(response)  # pyright: ignore[reportArgumentType] - not END
        finally:
            writer.cancel()

    def _dispatch(self, response: decode_pb2.SessionResponse) -> None:
        mailboxes = self._mailboxes
        for admitted in response.admitted:
            if mailbox := mailboxes.get(admitted.handle):
                mailbox.on_admitted(admitted)
        for output in response.outputs:
            if mailbox := mailboxes.get(output.handle):
                self._deliver(mailbox, output)
        for rejected in response.rejected:
            if mailbox := mailboxes.pop(rejected.handle, None):
                mailbox.on_failure(_rejection(rejected))

    def _deliver(self, mailbox: Mailbox, output: decode_pb2.SequenceOutput) -> None:
        try:
            mailbox.on_output(output)
        except Exception as error:  # one request's fault must not end the others' stream
            log.exception("output of handle %d could not be taken", output.handle)
            self.cancel(output.handle)
            mailbox.on_failure(Internal(f"output could not be taken: {error}", reason="OUTPUT"))

    def _end(self, error: KvmeshError) -> None:
        was_open, self._is_open = self._is_open, False
        mailboxes, self._mailboxes = self._mailboxes, {}
        self._prefetches.clear()
        if was_open:
            log.warning("session with %s ended: %s", self.instance.address, error)
            self.instance.fail(str(error))
            self._on_change()
        for mailbox in mailboxes.values():
            mailbox.on_failure(error)

    def _lost(self, why: str) -> Unavailable:
        return Unavailable(
            f"decode rank {self.instance.address}: {why}", reason="RANK_LOST", retryable=True
        )


async def _write(call: SessionCall, commands: asyncio.Queue[decode_pb2.SessionRequest]) -> None:
    """Sends commands until the call is over; the reader hears why."""
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
        while True:
            await call.write(await commands.get())


def _end_of(reading: asyncio.Task[None]) -> str:
    """Why a stream ended that nobody has reset."""
    if reading.cancelled():
        return "the stream was cancelled"
    error = reading.exception()
    if error is None:
        return "the rank ended the session"
    if isinstance(error, grpc.RpcError):
        return str(from_rpc_error(error))
    log.error("a session could not be read", exc_info=error)
    return f"the stream could not be read: {error!r}"


def _rejection(rejected: decode_pb2.Rejected) -> KvmeshError:
    kind = _REJECTIONS.get(rejected.code, Internal)
    return kind(rejected.message, reason="RANK_REJECTED")
