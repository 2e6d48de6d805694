"""Makes docs/img/live-*.png anew: the live page of a demo mesh under load, in headless Chromium.

`python -m tools.live_page_pictures`, two minutes. Owns the scenes; never edits a picture.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.browser import chromium, open_page
from tests.support.mesh import ROOT, Mesh, free_port, running_mesh
from tests.support.steady_load import steady_load

FOLDER = ROOT / "docs/img"
WARM_UP_S = 15.0
FIRST_LOAD_S, SECOND_LOAD_S = 40.0, 45.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture's name, window in pixels, theme and size; height None is the whole page."""

    name: str
    width: int
    height: int | None
    dark: bool
    scale: float


SCENES = (
    Scene(name="live-light", width=1280, height=None, dark=False, scale=0.75),
    Scene(name="live-dark", width=1280, height=None, dark=True, scale=0.75),
    Scene(name="live-phone", width=390, height=1290, dark=False, scale=1.0),
)
WINDOW_HEIGHT = 900


async def take(mesh: Mesh, url: str) -> None:
    """Some load, then more; then one picture after the other."""
    async with steady_load(mesh.address, num_clients=6):
        await asyncio.sleep(WARM_UP_S)
        async with open_page() as page:
            await page.look_like(width=1280, height=WINDOW_HEIGHT, dark=False)
            await page.go(url)
            await asyncio.sleep(FIRST_LOAD_S)
            async with steady_load(mesh.address, num_clients=10):
                await asyncio.sleep(SECOND_LOAD_S)
                for scene in SCENES:
                    await page.look_like(width=scene.width, height=WINDOW_HEIGHT, dark=scene.dark)
                    await asyncio.sleep(2.5)  # two frames in the new size
                    picture = await page.picture(scale=scene.scale, height=scene.height)
                    (FOLDER / f"{scene.name}.png").write_bytes(picture)
                    print(f"{scene.name}.png: {len(picture)} bytes")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/demo")
    model = parser.parse_args().model
    if chromium() is None:
        sys.exit("no chromium on PATH; on Debian: apt-get install chromium")
    FOLDER.mkdir(parents=True, exist_ok=True)
    port = free_port()
    flags = ("--http-port", str(port))
    with running_mesh(model, num_decode=2, gateway_flags=flags) as mesh:
        asyncio.run(take(mesh, f"http://127.0.0.1:{port}/"))


if __name__ == "__main__":
    main()
