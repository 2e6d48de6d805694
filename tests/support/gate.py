"""A gate on one hop of the mesh: every gRPC call passes through it, byte for byte.

Owns the calls while they are held: tests stop a request in an exact phase, see that it is there,
break something, and open the gate. It can also read and replace messages. Never opens by itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from mesh.channel import OPTIONS

REACHED_TIMEOUT_S = 30.0
Rewrite = Callable[[bytes], bytes]


@dataclass
class Hold:
    """Calls of one method wait here until `release`; `reached` says that one does."""

    loop: asyncio.AbstractEventLoop
    wants: Callable[[bytes], bool]
    num_held: int = 0
    messages: list[bytes] = field(default_factory=list)
    _reached: threading.Event = field(default_factory=threading.Event)
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def wait_reached(self) -> None:
        """Blocks until a call waits here: the proof that its phase was reached."""
        assert self._reached.wait(REACHED_TIMEOUT_S), "no call reached the gate"

    def release(self) -> None:
        """Lets everything through."""
        self.loop.call_soon_threadsafe(self._open.set)

    async def pass_through(self, message: bytes) -> None:
        """Waits if this message is wanted here."""
        if self._open.is_set() or not self.wants(message):
            return
        self.num_held += 1
        self.messages.append(message)
        self._reached.set()
        await self._open.wait()


class Gate:
    """A proxy in front of one address, whose server may die and come back. `close` ends it."""

    def __init__(self, target: str) -> None:
        self.target = target
        # By method, the latest answers: the last request before each, and the answer.
        self.seen: dict[str, deque[tuple[bytes, bytes]]] = defaultdict(lambda: deque(maxlen=20_000))
        self.sent: dict[str, deque[bytes]] = defaultdict(lambda: deque(maxlen=20_000))
        self._holds: dict[tuple[str, str], Hold] = {}
        self._rewrites: dict[str, Rewrite] = {}
        self._is_cut = False
        self._calls: set[grpc.aio.Call] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address = self._run(self._start())

    @contextmanager
    def hold(
        self,
        method: str,
        side: str = "request",
        wants: Callable[[bytes], bool] = lambda _: True,
    ) -> Iterator[Hold]:
        """Holds the requests, or the responses, of a method until released or left."""
        hold = self._holds[method, side] = Hold(self._loop, wants)
        try:
            yield hold
        finally:
            del self._holds[method, side]
            hold.release()

    @contextmanager
    def rewritten(self, method: str, rewrite: Rewrite) -> Iterator[None]:
        """Replaces responses of a method."""
        self._rewrites[method] = rewrite
        try:
            yield
        finally:
            del self._rewrites[method]

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Breaks what is under way and refuses what comes: the path is gone, both ends live."""
        self._is_cut = True
        self._loop.call_soon_threadsafe(lambda: [call.cancel() for call in set(self._calls)])
        try:
            yield
        finally:
            self._is_cut = False

    def send(self, method: str, request: bytes) -> bytes:
        """Makes a unary call of its own to the target, with a request seen or made up."""

        async def call() -> bytes:
            return await self._channel.unary_unary(method)(request, timeout=5)

        return self._run(call())

    def close(self) -> None:
        """Ends all calls."""

        async def stop() -> None:
            await self._server.stop(None)
            await self._channel.close()

        self._run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _start(self) -> str:
        self._channel = grpc.aio.insecure_channel(self.target, options=OPTIONS)
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ]
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((_Everything(self._serve),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def _serve(self, method: str, requests: AsyncIterator[bytes], context: Any) -> None:
        """Carries one call of any arity: on the wire a unary call is a stream of one."""
        if self._is_cut:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the gate is cut")
        remaining_s = context.time_remaining()
        call = self._channel.stream_stream(method)(
            timeout=remaining_s, metadata=context.invocation_metadata()
        )
        self._calls.add(call)
        sent: list[bytes] = []
        writer = asyncio.ensure_future(self._forward(method, requests, call, sent))
        try:
            while (message := await call.read()) is not grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
                assert isinstance(message, bytes)
                message = self._rewrites.get(method, lambda same: same)(message)
                self.seen[method].append((sent[-1] if sent else b"", message))
                await self._wait(method, "response", message)
                await context.write(message)
        except grpc.aio.AioRpcError as error:
            context.set_trailing_metadata(error.trailing_metadata() or ())
            await context.abort(error.code(), error.details() or "")
        except asyncio.CancelledError:
            if call.cancelled() and self._is_cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the gate was cut")
            raise
        finally:
            self._calls.discard(call)
            writer.cancel()
            call.cancel()

    async def _forward(
        self, method: str, requests: AsyncIterator[bytes], call: Any, sent: list[bytes]
    ) -> None:
        async for message in requests:
            await self._wait(method, "request", message)
            sent.append(message)
            self.sent[method].append(message)
            await call.write(message)
        await call.done_writing()

    async def _wait(self, method: str, side: str, message: bytes) -> None:
        if hold := self._holds.get((method, side)):
            await hold.pass_through(message)


class _Everything(grpc.GenericRpcHandler):
    """One handler for all methods, on bytes."""

    def __init__(self, serve: Callable[[str, AsyncIterator[bytes], Any], Any]) -> None:
        self._serve = serve

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method

        async def handle(requests: AsyncIterator[bytes], context: Any) -> None:
            await self._serve(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(handle)
