"""Headless Chromium over its DevTools protocol, for tests and pictures of the live page.

Owns the browser's process. Needs Debian's `chromium` (or another one on PATH) and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

_FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-lcd-text",  # coloured edges make pictures larger
    "--disable-background-networking",
    "--disable-component-update",
)
_LISTENING = re.compile(rb"DevTools listening on (ws://\S+)")
START_TIMEOUT_S = 60.0


def chromium() -> str | None:
    """The browser's program; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """One tab. `problems` are the console's errors and warnings, and exceptions."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self._socket = socket
        self._session_id = ""
        self._loaded = asyncio.Event()
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def open(self) -> None:
        """Makes the tab."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session_id = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")

    async def look_like(self, *, width: int, height: int, dark: bool) -> None:
        """The window's size in pixels, and the preferred theme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[theme])

    async def go(self, url: str) -> None:
        """Loads a page and all it names."""
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        async with asyncio.timeout(START_TIMEOUT_S):
            await self._loaded.wait()

    async def value(self, expression: str, timeout_s: float = 30.0) -> Any:
        """What JavaScript says; a promise is awaited. AssertionError when it throws."""
        result = await self.call(
            "Runtime.evaluate",
            timeout_s, expression=expression, returnByValue=True, awaitPromise=True,
        )  # fmt: skip
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str, timeout_s: float = 60.0) -> None:
        """Waits until JavaScript says true; AssertionError, with its text, if it does not."""
        again = f"const again = () => ({expression}) ? done() : setTimeout(again, 50)"
        try:
            await self.value(f"new Promise((done) => {{ {again}; again(); }})", timeout_s)
        except TimeoutError:
            text = await self.value("document.body?.innerText")
            raise AssertionError(f"never true: {expression}\n{self.problems}\n{text}") from None

    async def picture(self, *, scale: float = 1.0, height: int | None = None) -> bytes:
        """A PNG of the page, of its first `height` pixels only if given, `scale` times as large."""
        content = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": content["width"], "scale": scale}
        clip["height"] = height or content["height"]
        picture = await self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
        )
        return base64.b64decode(picture["data"])

    async def call(self, method: str, timeout_s: float = 30.0, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self._ids)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session_id:
            message["sessionId"] = self._session_id
        await self._socket.send_json(message)
        async with asyncio.timeout(timeout_s):
            return await answer

    async def listen(self) -> None:
        """Hands answers out and collects problems until the browser is gone."""
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                self._settle(event)
            elif event["method"] == "Page.loadEventFired":
                self._loaded.set()
            elif problem := _problem(event["method"], event["params"]):
                self.problems.append(problem)

    def _settle(self, event: dict[str, Any]) -> None:
        answer = self._answers.pop(event["id"])
        if answer.done():
            return
        if "error" in event:
            answer.set_exception(AssertionError(event["error"]))
        else:
            answer.set_result(event["result"])


@contextlib.asynccontextmanager
async def open_page() -> AsyncIterator[Page]:
    """A browser with one tab, for the length of a with block."""
    program = chromium()
    assert program is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            program, *_FLAGS, f"--user-data-dir={Path(profile)}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                url = await _listening_at(process)
            draining = asyncio.ensure_future(_drain(process))
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(url, max_msg_size=0) as socket,
            ):
                page = Page(socket)
                listening = asyncio.ensure_future(page.listen())
                await page.open()
                yield page
                await page.call("Browser.close")
                await listening
            await draining
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _listening_at(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    while line := await process.stderr.readline():
        if match := _LISTENING.search(line):
            return match.group(1).decode()
    raise AssertionError(f"chromium ended with {await process.wait()}")


async def _drain(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    while await process.stderr.read(65536):
        pass


def _problem(method: str, params: dict[str, Any]) -> str:
    if method == "Runtime.exceptionThrown":
        details = params["exceptionDetails"]
        return details.get("exception", {}).get("description") or details["text"]
    if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        return " ".join(str(argument.get("value")) for argument in params["args"])
    if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        entry = params["entry"]
        return f"{entry['text']} {entry.get('url', '')}"
    return ""
