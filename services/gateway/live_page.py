"""The gateway's HTTP admin port: the live page, its event stream and a health check.

Owns the server and who looks. Everything it serves is in memory or made for it: no path leads to
a file, nothing comes from another host, nothing tells of a prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from mesh.process import StartupError
from protos import status_pb2
from services.gateway.live_feed import LiveFeed

MAX_VIEWERS = 32
SLOW_AFTER_S = 10.0
_CLOSE_GRACE_S = 0.5
_SEND_BUFFER_BYTES = 2**16
_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LivePage:
    """Build inside the loop, then `start`; `close` ends every stream at once.

    names: hosts by which browsers may ask for it, beside addresses, localhost and this host's name.
    snapshot: the mesh's statuses, the gateway first.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        names: Sequence[str],
        snapshot: Callable[[], Sequence[status_pb2.InstanceStatus]],
        interval_s: float = 1.0,
        slow_after_s: float = SLOW_AFTER_S,
    ) -> None:
        self._host, self._port = host, port
        self._names = {name.lower() for name in ("localhost", host, socket.gethostname(), *names)}
        self._snapshot = snapshot
        self._slow_after_s = slow_after_s
        self._feed = LiveFeed(snapshot, interval_s)
        self._num_viewers = 0
        self._files = {path.name: _File(path) for path in _FOLDER.iterdir()}
        app = web.Application(middlewares=[self._refuse_strangers])
        app.on_response_prepare.append(_add_headers)
        app.router.add_get("/", self._page)
        app.router.add_get("/assets/{name}", self._asset)
        app.router.add_get("/events", self._events, allow_head=False)
        app.router.add_get("/healthz", self._health)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_GRACE_S)

    async def start(self) -> int:
        """Listens; returns the port. StartupError if it cannot be had."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise StartupError(
                f"cannot serve the live page on {self._host}:{self._port} (--http-port): "
                f"{error.strerror or error}"
            ) from error
        return self._runner.addresses[0][1]

    async def close(self) -> None:
        """Ends the event streams, then stops listening."""
        self._feed.close()
        await self._runner.cleanup()

    @web.middleware
    async def _refuse_strangers(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A name that an attacker points at this address (DNS rebinding) gets no answer.

        Addresses cannot be pointed anywhere. Health checks call by any name and learn nothing.
        """
        host = request.headers.get(hdrs.HOST, "")
        if request.path != "/healthz" and not self._is_own(host):
            text = (
                f"Host {host[:100]!r} is not a name of this gateway: use its address, localhost, "
                "its host name or one that --http-hosts allows\n"
            )
            raise web.HTTPMisdirectedRequest(text=text)
        return await handler(request)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or _is_address(name)

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return self._files["index.html"].answer(request)

    async def _asset(self, request: web.Request) -> web.StreamResponse:
        file = self._files.get(request.match_info["name"])
        if file is None:
            raise web.HTTPNotFound(text=f"no asset {request.match_info['name'][:100]!r}\n")
        return file.answer(request)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        """200 while new requests are taken; 503 with the reason otherwise."""
        own = self._snapshot()[0]
        text = "ready\n" if own.ready else f"not ready: {own.detail}\n"
        return web.Response(
            status=200 if own.ready else 503, text=text, headers={"Cache-Control": "no-store"}
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """One frame a second until the browser, the gateway or patience is gone."""
        if self._num_viewers >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(
                text=f"/events: {self._num_viewers} viewers are connected, the limit is "
                f"{MAX_VIEWERS}\n",
                headers={"Retry-After": "10"},
            )
        self._num_viewers += 1
        try:
            return await self._stream(request)
        finally:
            self._num_viewers -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Cache-Control": "no-store"})
        response.content_type = "text/event-stream"
        _bound_send_buffer(request)
        await response.prepare(request)
        number = 0
        try:
            while news := await self._feed.next(number):
                number, frame = news
                async with asyncio.timeout(self._slow_after_s):
                    await response.write(frame)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()  # with all that it never read
        except ConnectionError:
            pass  # the browser is gone, as browsers go
        return response


class _File:
    """A file of the page, read once; browsers ask each time whether it is still the same."""

    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        self._type = _TYPES[path.suffix]
        self._etag = hashlib.sha256(self._body).hexdigest()[:32]

    def answer(self, request: web.Request) -> web.Response:
        """The file, or 304 to whoever has it."""
        etags = request.if_none_match or ()
        is_known = any(etag.value == self._etag for etag in etags)
        response = web.Response(status=304) if is_known else web.Response(body=self._body)
        if not is_known:
            response.content_type, response.charset = self._type, "utf-8"
        response.etag = self._etag
        response.headers["Cache-Control"] = "no-cache"
        return response


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _bound_send_buffer(request: web.Request) -> None:
    """The kernel keeps little for a viewer that does not read."""
    assert request.transport is not None
    connection = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)
