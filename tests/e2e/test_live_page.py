"""The live page in headless Chromium, over a mesh of real processes under load."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from services.gateway.live_page import MAX_VIEWERS
from tests.support.browser import Page, chromium, open_page
from tests.support.mesh import ROOT, Mesh, free_port, running_mesh, wait_ready
from tests.support.steady_load import steady_load

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        chromium() is None, reason="no chromium on PATH: the live page is not looked at"
    ),
]

HTTP_PORT = free_port()
URL = f"http://127.0.0.1:{HTTP_PORT}/"
STATE = "document.querySelector('#state').textContent"
# Pixels of a chart that are clearly bluer than red: lines, fills and cells, never axes or text.
NUM_BLUE = """
[...document.querySelectorAll('[data-chart=%s] canvas')].reduce((sum, canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height);
  const context = copy.getContext('2d', { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const pixels = context.getImageData(0, 0, copy.width, copy.height).data;
  let blue = 0;
  for (let i = 0; i < pixels.length; i += 4) {
    blue += pixels[i + 3] > 20 && pixels[i + 2] > pixels[i] + 60;
  }
  return sum + blue;
}, 0)
"""


def figure(name: str) -> str:
    """A tile's number, in JavaScript."""
    text = f"document.querySelector('[data-figure={name}]').textContent"
    return f"parseFloat({text}.replaceAll(',', ''))"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    flags = ("--http-port", str(HTTP_PORT))
    with running_mesh(ROOT / "models/demo", num_decode=2, gateway_flags=flags) as mesh:
        yield mesh


@contextlib.asynccontextmanager
async def watching(mesh: Mesh) -> AsyncIterator[Page]:
    """A browser beside a mesh under load."""
    async with steady_load(mesh.address, num_clients=6), open_page() as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
async def test_figures_and_charts_appear(mesh: Mesh, width: int, dark: bool) -> None:
    async with watching(mesh) as page:
        await page.look_like(width=width, height=844, dark=dark)
        await page.go(URL)
        for name in ("tokens_per_s", "steps_per_s", "step_tokens_p50", "inter_token_p50_s"):
            await page.until(f"{figure(name)} > 0")
        for chart in ("tokens", "step_tokens", "parts", "inter_token", "sequences"):
            await page.until(f"{NUM_BLUE % chart} > 50")
        rows = await page.value("document.querySelector('#instances tbody').innerText")
        for name in ("gateway 0", "prefill 0", "decode 0", "decode 1", "kvstore 0"):
            assert name in rows
        assert await page.value(STATE) == "live"
        assert await page.value("document.documentElement.scrollWidth") == width
        background = await page.value("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, background[4:-1].split(","))) < 60) is dark
        assert not page.problems


async def test_charts_are_drawn_anew_when_the_theme_changes(mesh: Mesh) -> None:
    async with watching(mesh) as page:
        await page.look_like(width=1280, height=844, dark=False)
        await page.go(URL)
        await page.until(f"{figure('tokens_per_s')} > 0")
        await page.until(f"{NUM_BLUE % 'tokens'} > 50")
        await page.value("document.querySelectorAll('.uplot').forEach((p) => p.id = 'old')")
        await page.look_like(width=1280, height=844, dark=True)
        await page.until("!document.querySelector('#old')")
        await page.until("document.querySelectorAll('.uplot').length === 7")
        await page.until(f"{NUM_BLUE % 'tokens'} > 50")
        assert not page.problems


async def test_a_page_outlives_its_gateway(mesh: Mesh) -> None:
    async with open_page() as page:
        await page.go(URL)
        await page.until(f"{STATE} === 'live'")
        mesh.gateway.popen.terminate()
        await page.until(f"{STATE} === 'the gateway is gone, trying again'")
        assert mesh.gateway.popen.wait(30) == 0
        await asyncio.to_thread(wait_ready, mesh.respawn(mesh.gateway))
        mesh.address = mesh.gateway.address
        await page.until(f"{STATE} === 'live'")


async def test_a_page_too_many_says_so_and_comes_in_when_another_leaves(mesh: Mesh) -> None:
    async with aiohttp.ClientSession() as client, open_page() as page:
        streams: list[aiohttp.ClientResponse] = []
        while len(streams) < MAX_VIEWERS:  # the page of the test before may still count
            if (stream := await client.get(f"{URL}events")).status == 200:
                streams.append(stream)
        await page.go(URL)
        await page.until(f"{STATE} === 'the gateway refuses more viewers, trying again'")
        for stream in streams:
            stream.close()
        await page.until(f"{STATE} === 'live'")


def test_the_pictures_of_the_documents_are_small() -> None:
    pictures = sorted((ROOT / "docs/img").glob("live-*.png"))
    assert [picture.stem for picture in pictures] == ["live-dark", "live-light", "live-phone"]
    assert all(Path(picture).stat().st_size < 200_000 for picture in pictures)
