"""The HTTP admin port without a browser: events, limits, hosts, headers, and how it ends."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from mesh.process import StartupError
from protos import common_pb2, gateway_pb2, status_pb2
from services.gateway import live_page
from services.gateway.live_page import LivePage

SECRET = "a prompt that nobody else may see"


def statuses(num_ranks: int = 1, *, ready: bool = True) -> list[status_pb2.InstanceStatus]:
    gateway = status_pb2.InstanceStatus(
        role=status_pb2.ROLE_GATEWAY, ready=ready, detail="" if ready else "draining"
    )
    ranks = [
        status_pb2.InstanceStatus(
            role=status_pb2.ROLE_DECODE,
            address=f"127.0.0.1:{number}",
            ready=True,
            decode_steps=status_pb2.DecodeSteps(),
        )
        for number in range(num_ranks)
    ]
    return [gateway, *ranks]


class Site:
    """A live page on a free port, and a client for it."""

    def __init__(self) -> None:
        self.statuses = statuses()
        self.client: Any = None
        self.page: Any = None
        self.url = ""

    async def start(self, **options: Any) -> None:
        self.page = LivePage(
            **{"host": "127.0.0.1", "port": 0, "names": ("mesh.example",), "interval_s": 0.02},
            **options,
            snapshot=lambda: self.statuses,
        )
        self.url = f"http://127.0.0.1:{await self.page.start()}"
        self.client = aiohttp.ClientSession()

    async def get(self, path: str, **headers: str) -> aiohttp.ClientResponse:
        return await self.client.get(self.url + path, headers=headers)

    async def until_viewed_by(self, num_viewers: int) -> None:
        for _ in range(3000):
            if self.page._num_viewers == num_viewers:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{self.page._num_viewers} viewers, never {num_viewers}")

    async def close(self) -> None:
        if self.client is not None:
            await self.client.close()
            await self.page.close()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    yield site
    await site.close()


async def frame(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The next event of a stream."""
    line = await response.content.readline()
    assert line.startswith(b"data: "), line
    assert await response.content.readline() == b"\n"
    return json.loads(line.removeprefix(b"data: "))


async def test_events_are_the_mesh_once_an_interval(site: Site) -> None:
    await site.start()
    async with await site.get("/events") as events:
        assert events.content_type == "text/event-stream"
        assert events.headers["Cache-Control"] == "no-store"
        first, second = await frame(events), await frame(events)
    assert [instance["role"] for instance in first["instances"]] == ["gateway", "decode"]
    assert second["time_s"] > first["time_s"]
    assert len(first["bounds"]["inter_token_s"]) == 20


async def test_viewers_share_frames(site: Site) -> None:
    await site.start()
    streams = [await site.get("/events") for _ in range(8)]

    async def times(events: aiohttp.ClientResponse) -> set[float]:
        return {(await frame(events))["time_s"] for _ in range(10)}

    seen = await asyncio.gather(*map(times, streams))
    assert all(len(times_s) == 10 for times_s in seen)  # none twice to one viewer
    assert set.intersection(*seen)


async def test_one_viewer_too_many_is_told_the_limit(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_page, "MAX_VIEWERS", 2)
    await site.start()
    streams = [await site.get("/events") for _ in range(2)]
    refused = await site.get("/events")
    assert refused.status == 503 and refused.headers["Retry-After"]
    assert "2 viewers are connected, the limit is 2" in await refused.text()
    streams[0].close()
    await site.until_viewed_by(1)
    assert (await frame(await site.get("/events")))["instances"]


async def test_a_viewer_that_does_not_read_is_dropped(site: Site) -> None:
    site.statuses = statuses(num_ranks=500)  # frames of hundreds of kB fill the buffers soon
    await site.start(slow_after_s=0.2)
    host, port = site.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await site.until_viewed_by(1)
        await site.until_viewed_by(0)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:50053", "127.0.0.1:1", "192.0.2.7", "[::1]:50053", "mesh.example"],
)
async def test_its_own_hosts_are_answered(site: Site, host: str) -> None:
    await site.start()
    assert (await site.get("/", Host=host)).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:50053", "[::1", ""]
)
@pytest.mark.parametrize("path", ["/", "/events", "/assets/live.js"])
async def test_a_strange_host_is_refused_by_name(site: Site, path: str, host: str) -> None:
    await site.start()
    answer = await site.get(path, Host=host)
    text = await answer.text()
    assert answer.status == 421 and repr(host) in text and "--http-hosts" in text
    assert "mesh.example" not in text


async def test_health_checks_may_come_by_any_name(site: Site) -> None:
    await site.start()
    assert (await site.get("/healthz", Host="gateway.default.svc")).status == 200
    site.statuses = statuses(ready=False)
    answer = await site.get("/healthz")
    assert answer.status == 503 and await answer.text() == "not ready: draining\n"


async def test_everything_the_page_names_is_served_from_here(site: Site) -> None:
    await site.start()
    answer = await site.get("/")
    text = await answer.text()
    assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert not re.search(r"<script>|style=|onclick|https?://", text)
    names = re.findall(r'(?:href|src)="([^"]+)"', text)
    live = await (await site.get("/assets/live.js")).text()
    names += [f"/assets/{name}" for name in re.findall(r'from "\./([^"]+)"', live)]
    assert len(names) > 6
    for name in names:
        asset = await site.get(name)
        assert asset.status == 200 and asset.headers["X-Content-Type-Options"] == "nosniff"


async def test_assets_are_asked_for_again_and_not_sent_again(site: Site) -> None:
    await site.start()
    first = await site.get("/assets/style.css")
    assert first.content_type == "text/css" and first.headers["Cache-Control"] == "no-cache"
    second = await site.get("/assets/style.css", **{"If-None-Match": first.headers["ETag"]})
    assert second.status == 304 and not await second.read()
    third = await site.get("/assets/style.css", **{"If-None-Match": '"another"'})
    assert third.status == 200


@pytest.mark.parametrize(
    "path", ["/assets/nothing.js", "/assets/..%2flive_page.py", "/assets/../live_page.py", "/x"]
)
async def test_no_path_leads_elsewhere(site: Site, path: str) -> None:
    await site.start()
    assert (await site.get(path)).status == 404


async def test_nothing_is_written_through_it(site: Site) -> None:
    await site.start()
    for path in ("/", "/events", "/healthz"):
        assert (await site.client.post(site.url + path)).status == 405


async def test_a_taken_port_is_named(site: Site) -> None:
    await site.start()
    port = int(site.url.rpartition(":")[2])
    other = LivePage(host="127.0.0.1", port=port, names=(), snapshot=statuses)
    with pytest.raises(StartupError, match=f"127.0.0.1:{port} \\(--http-port\\)"):
        await other.start()


async def test_open_streams_end_with_the_gateway(make_rig: Any) -> None:
    rig = await make_rig(http_port=0)
    async with aiohttp.ClientSession() as client:
        address = rig.gateway.live_page_address
        async with client.get(f"http://{address}/events") as events:
            board = await frame(events)
            assert [i["role"] for i in board["instances"]][:2] == ["gateway", "prefill"]
            closing = asyncio.ensure_future(rig.gateway.close())
            while not events.content.at_eof():
                await events.content.readline()
            await closing
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address.split(":"))


async def test_no_prompt_is_told(make_rig: Any) -> None:
    rig = await make_rig(http_port=0)
    request = gateway_pb2.GenerateRequest(
        text=SECRET, request_id="told-by-id", stopping=common_pb2.StoppingParams(max_new_tokens=50)
    )
    url = f"http://{rig.gateway.live_page_address}/events"
    async with aiohttp.ClientSession() as client, client.get(url) as events:
        answering = asyncio.ensure_future(rig.generate(request))
        text = b"".join([await events.content.readline() for _ in range(4)])
        await answering
    assert b"instances" in text and SECRET.encode() not in text and b"told-by-id" not in text


async def test_without_its_flag_there_is_no_page(make_rig: Any) -> None:
    rig = await make_rig()
    assert rig.gateway.live_page_address == ""
