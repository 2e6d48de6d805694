"""Sources of addresses: what is taken, what is followed, and what trouble leaves as it was."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from mesh import discovery, discovery_sources
from mesh.discovery import Discovery, parse_sources
from mesh.discovery_sources import Resolve, in_thread, resolve_host

PATIENCE_S = 20.0
Warned = Callable[[str], Awaitable[list[str]]]


class Watch:
    """Discoveries, and the lists they told."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[list[str]] = asyncio.Queue()
        self._made: list[Discovery] = []

    async def start(self, *sources: str, resolve: Resolve = resolve_host) -> list[str]:
        made = Discovery(parse_sources(",".join(sources)), resolve=resolve)
        self._made.append(made)
        await made.start(self.told.put_nowait)
        return self.told.get_nowait()

    async def next(self) -> list[str]:
        return await asyncio.wait_for(self.told.get(), PATIENCE_S)

    async def close(self) -> None:
        for made in self._made:
            await made.close()
        assert self.told.empty()


class Names:
    """A resolver that answers what a test says and counts how often it was asked."""

    def __init__(self, *addresses: str) -> None:
        self.answer: list[str] | Exception = list(addresses)
        self.gate: asyncio.Event | None = None
        self.num_asked = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        assert (host, port) == ("stores.svc", 7000)
        self.num_asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
async def watch(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watch]:
    monkeypatch.setattr(discovery_sources, "FILE_INTERVAL_S", 0.02)
    monkeypatch.setattr(discovery_sources, "DNS_INTERVAL_S", 0.02)
    monkeypatch.setattr(discovery_sources, "DNS_TIMEOUT_S", 0.05)
    num_tasks = len(asyncio.all_tasks())
    made = Watch()
    yield made
    await made.close()
    assert len(asyncio.all_tasks()) == num_tasks


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Warned:
    """Waits for a warning with these words; returns all there are."""

    async def wait(words: str) -> list[str]:
        await _until(lambda: any(words in text for text in caplog.messages))
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    return wait


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a log tells nobody
            await asyncio.sleep(0.005)


def _replace(path: Path, text: str) -> None:
    other = path.with_suffix(".new")
    other.write_text(text)
    os.replace(other, path)


@pytest.mark.parametrize(
    "text",
    [
        "store", "store:", ":7000", "store:0", "store:65536", "store:7000/x", "::1:7000", "a b:1",
        "file:", "dns:store", "dns:", "http://store:1", "dns:store:99999",
    ],
)  # fmt: skip
def test_what_is_no_source_is_named_with_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_sources(f"store:7000,{text}")
    assert repr(text) in str(raised.value)
    assert all(kind in str(raised.value) for kind in ("host:port", "file:PATH", "dns:HOST:PORT"))


async def test_fixed_addresses_stay_and_duplicates_collapse(watch: Watch, tmp_path: Path) -> None:
    path = tmp_path / "stores"
    path.write_text("# two\nb:2\n\n  [::1]:3  # by hand\nb:2\n")
    names = Names("c:7000", "a:1", "c:7000")
    told = await watch.start(
        "a:1", f"file:{path}", "a:1", "dns:stores.svc:7000", "dns:8", "file:9", resolve=names
    )
    assert told == ["a:1", "b:2", "[::1]:3", "c:7000", "dns:8", "file:9"]
    assert await watch.start() == []


async def test_a_file_is_followed_when_it_is_replaced_or_written(
    watch: Watch, tmp_path: Path
) -> None:
    path = tmp_path / "stores"
    path.write_text("a:1")
    assert await watch.start(f"file:{path}", "z:9") == ["a:1", "z:9"]
    _replace(path, "a:1\nb:2\n")
    assert await watch.next() == ["a:1", "b:2", "z:9"]
    path.write_text("b:3\n")  # of the same length as what follows
    assert await watch.next() == ["b:3", "z:9"]
    path.write_text("b:4\n")
    assert await watch.next() == ["b:4", "z:9"]
    _replace(path, "# none for now\n")
    assert await watch.next() == ["z:9"]


async def test_a_link_to_another_list_is_followed(watch: Watch, tmp_path: Path) -> None:
    for name in ("a:1", "b:2"):
        (tmp_path / name).write_text(name)
    path = tmp_path / "stores"
    path.symlink_to("a:1")
    assert await watch.start(f"file:{path}") == ["a:1"]
    (tmp_path / "new").symlink_to("b:2")
    os.replace(tmp_path / "new", path)
    assert await watch.next() == ["b:2"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: os.truncate(path, 0), "the file is empty"),
        (lambda path: path.write_text("a:1\n\nb7\n"), "line 3: 'b7' is not host:port"),
        (lambda path: path.write_bytes(b"\xff\xfe:7 7"), "line 1:"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is not a regular file"),
        (lambda path: os.truncate(path, 2**21), "2097152 bytes, limit 1048576"),
    ],
    ids=["missing", "empty", "invalid", "binary", "directory", "pipe", "huge"],
)  # fmt: skip
async def test_a_file_in_trouble_keeps_the_last_list_and_says_so_once(
    watch: Watch, warned: Warned, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "stores"
    path.write_text("a:1\nb:2\n")
    assert await watch.start(f"file:{path}") == ["a:1", "b:2"]
    spoil(path)
    (warning,) = await warned(words)
    assert warning.startswith(f"file:{path}: ") and warning.endswith("stays, 2 addresses")
    if path.is_dir():
        path.rmdir()
    _replace(path, "a:1\nc:3\n")
    assert await watch.next() == ["a:1", "c:3"]
    assert await warned(words) == [warning]


async def test_a_list_that_is_missing_at_first_is_found_later(
    watch: Watch, warned: Warned, tmp_path: Path
) -> None:
    path = tmp_path / "stores"
    assert await watch.start("z:9", f"file:{path}") == ["z:9"]
    assert "No such file" in (await warned("file:"))[0]
    path.write_text("a:1")
    assert await watch.next() == ["z:9", "a:1"]


async def test_half_a_list_is_not_taken_while_it_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "stores"
    path.write_text("a:1")
    source = discovery_sources.FileSource("it", str(path), discovery.is_address)
    assert await source.look() == ("a:1",)
    assert await source.look() == ("a:1",)
    for text in ("a:1\nb:7", "a:1\nb:70", "a:1\nb:7000\n"):
        path.write_text(text)
        assert await source.look() is None
    assert await source.look() == ("a:1", "b:7000")
    assert await source.look() is None
    for number in range(3):  # one who writes the same all the time is heard all the same
        _replace(path, "c:3")
        assert await source.look() == (("c:3",) if number else None)


async def test_a_name_is_followed_and_a_failure_keeps_its_addresses(
    watch: Watch, warned: Warned
) -> None:
    names = Names("10.0.0.2:7000", "10.0.0.1:7000")
    told = await watch.start("dns:stores.svc:7000", resolve=names)
    assert told == ["10.0.0.1:7000", "10.0.0.2:7000"]
    names.answer = ["10.0.0.1:7000", "10.0.0.2:7000"]  # in another order, as resolvers do
    num_asked = names.num_asked
    await _until(lambda: names.num_asked > num_asked + 2)
    names.answer = ["10.0.0.3:7000"]
    assert await watch.next() == ["10.0.0.3:7000"]
    names.answer = OSError("the resolver is gone")
    assert len(await warned("the resolver is gone")) == 1
    names.answer = []
    assert len(await warned("no addresses")) == 2
    names.answer = ["10.0.0.3:7000", "10.0.0.4:7000"]
    assert await watch.next() == ["10.0.0.3:7000", "10.0.0.4:7000"]


async def test_a_silent_resolver_is_asked_once_at_a_time(
    watch: Watch, warned: Warned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "_START_TIMEOUT_S", 0.1)
    names = Names("10.0.0.1:7000")
    names.gate = asyncio.Event()
    assert await watch.start("z:9", "dns:stores.svc:7000", resolve=names) == ["z:9"]
    assert "no answer within" in (await warned("dns:"))[0]
    assert names.num_asked == 1
    names.gate.set()
    assert await watch.next() == ["z:9", "10.0.0.1:7000"]


async def test_localhost_resolves_to_one_address_a_store(watch: Watch) -> None:
    assert await resolve_host("localhost", 7000) == ["127.0.0.1:7000"]
    assert await resolve_host("::1", 7000) == ["[::1]:7000"]
    with pytest.raises(OSError):
        await resolve_host("no-such-host.invalid", 7000)


async def test_a_stuck_look_delays_nobody(watch: Watch) -> None:
    over = threading.Event()
    stuck = in_thread(over.wait)
    stuck.cancel()
    assert all(t.daemon for t in threading.enumerate() if t.name == "discovery")
    over.set()
