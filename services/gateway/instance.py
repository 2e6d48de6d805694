"""One polled process of the mesh: its last status and this gateway's load on it.

Owns its channel. Never decides who gets a request (the router does).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import grpc

from protos import status_pb2, status_pb2_grpc


class Instance:
    """A prefill, decode or kvstore process as this gateway knows it."""

    def __init__(self, role: status_pb2.Role, address: str, channel: grpc.aio.Channel) -> None:
        self.role = role
        self.address = address
        self.channel = channel
        self.num_outstanding = 0  # tokens of live requests placed here by this gateway
        self.chosen_at = 0  # the router's count of choices when this one was chosen last
        self._stub = status_pb2_grpc.StatusServiceStub(channel)
        self._status: status_pb2.InstanceStatus | None = None
        self._failure = "not asked yet"
        self._listeners: set[Callable[[str], None]] = set()
        self._ending: set[grpc.aio.Call] = set()

    @property
    def is_ready(self) -> bool:
        """Whether the last poll succeeded, nothing failed since, and the process takes work."""
        return not self._failure and self._status is not None and self._status.ready

    @property
    def has_failed(self) -> bool:
        """Whether the last poll or a call since then failed."""
        return bool(self._failure)

    @property
    def model(self) -> status_pb2.WorkerModel | None:
        """The model of a ready worker."""
        if not self.is_ready or self._status is None or not self._status.HasField("model"):
            return None
        return self._status.model

    @property
    def status(self) -> status_pb2.InstanceStatus:
        """The last status; not ready, with the reason, when the process did not answer since."""
        status = status_pb2.InstanceStatus(role=self.role, address=self.address)
        if self._status is not None:
            status.CopyFrom(self._status)
        status.address = self.address
        if self._failure:
            status.ready = False
            status.detail = f"unreachable: {self._failure}"
        return status

    async def poll(self, timeout_s: float) -> None:
        """Reads the status; a failure is kept as the reason this instance is not ready."""
        try:
            answer = await self._stub.GetStatus(status_pb2.GetStatusRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            self._failure = f"{error.code().name}: {error.details()}"
            return
        if answer.instances:
            self._status, self._failure = answer.instances[0], ""
        else:
            self._failure = "answered without a status"

    def fail(self, reason: str) -> None:
        """Takes it out of the choice until the next good poll."""
        self._failure = reason or "failed"

    def lose(self, reason: str) -> None:
        """It does not answer any more: ends everything that waits for it."""
        self.fail(reason)
        for listener in list(self._listeners):
            listener(reason)

    def see_off(self, call: grpc.aio.Call) -> None:
        """Keeps a call whose answer is complete until it has ended: dropped, it is cancelled."""
        if not call.done():
            self._ending.add(call)
            call.add_done_callback(self._ending.discard)  # pyright: ignore[reportArgumentType]

    @contextlib.contextmanager
    def load(self, num_tokens: int) -> Iterator[None]:
        """Counts tokens as outstanding here."""
        self.num_outstanding += num_tokens
        try:
            yield
        finally:
            self.num_outstanding -= num_tokens

    @contextlib.contextmanager
    def when_lost(self, listener: Callable[[str], None]) -> Iterator[None]:
        """Calls the listener with the reason if the instance is lost meanwhile."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)
