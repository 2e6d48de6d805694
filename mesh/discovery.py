"""Where the members of a mesh are: fixed addresses, lists in files, names in DNS, all followed.

Owns the sources and the last good answer of each; a source in trouble keeps it. Never connects to
what it finds.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence

from mesh.discovery_sources import DnsSource, FileSource, Resolve, Source, SourceError, resolve_host

log = logging.getLogger("kvmesh.discovery")

_START_TIMEOUT_S = 2.5
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/,#\[\]]+):([0-9]{1,5})")
_ACCEPTED = "host:port, file:PATH (a list, one host:port a line) or dns:HOST:PORT"
SOURCES_HELP = (
    "kvstores, comma-separated: host:port; file:PATH, a list with one host:port a line; "
    "dns:HOST:PORT, every address of a name. Files and names are followed while this runs; the "
    "address decides which blocks a store owns, so write it the same for every process"
)


def parse_sources(text: str) -> tuple[str, ...]:
    """The sources in a comma-separated flag, each once; ValueError names what is none."""
    sources = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    Discovery(sources)
    return sources


def is_address(text: str) -> bool:
    """Whether this is host:port; an IPv6 host stands in brackets."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match.group(1)) < 2**16


class Discovery:
    """The addresses that `sources` name now. `start` on the loop, `close` at the end.

    ValueError: a source is none of host:port, file:PATH, dns:HOST:PORT.
    """

    def __init__(self, sources: Sequence[str], *, resolve: Resolve = resolve_host) -> None:
        self._found: dict[str, tuple[str, ...]] = {}  # by source, in the order given
        self._followed: list[Source] = []
        for text in sources:
            kind, _, rest = text.partition(":")
            self._found[text] = ()
            if kind == "file" and rest and not rest.isdecimal():
                self._followed.append(FileSource(text, rest, is_address))
            elif kind == "dns" and is_address(rest):
                host, _, port = rest.rpartition(":")
                self._followed.append(DnsSource(text, host.strip("[]"), int(port), resolve))
            elif is_address(text):
                self._found[text] = (text,)
            else:
                raise ValueError(f"{text!r} is none of {_ACCEPTED}")
        self._troubles: dict[str, str] = {}
        self._on_change: Callable[[list[str]], None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def addresses(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys(address for found in self._found.values() for address in found))

    async def start(self, on_change: Callable[[list[str]], None]) -> None:
        """Calls on_change with the first addresses, after 2.5 s at most, and whenever they change.

        A source that cannot be had yet gives none; it is followed all the same.
        """
        looked = [asyncio.Event() for _ in self._followed]
        for source, event in zip(self._followed, looked, strict=True):
            task = asyncio.ensure_future(self._follow(source, event))
            task.add_done_callback(_report)
            self._tasks.append(task)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                for event in looked:
                    await event.wait()
        except TimeoutError:
            log.warning("not all sources have answered; they are followed")
        self._on_change = on_change
        on_change(self.addresses)

    async def close(self) -> None:
        """Follows nothing any more."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for source in self._followed:
            source.close()

    async def _follow(self, source: Source, looked: asyncio.Event) -> None:
        while True:
            await self._look(source)
            looked.set()
            await asyncio.sleep(source.interval_s)

    async def _look(self, source: Source) -> None:
        name = source.name
        try:
            found = await source.look()
        except SourceError as error:
            if self._troubles.get(name) != str(error):
                num = len(self._found[name])
                log.warning("%s: %s; the last good list stays, %d addresses", name, error, num)
            self._troubles[name] = str(error)
            return
        if found is None:
            return
        if self._troubles.pop(name, None):
            log.info("%s: good again", name)
        if found != self._found[name]:
            self._found[name] = found
            log.info("%s: %s", name, ", ".join(found) or "no addresses")
            if self._on_change is not None:
                self._on_change(self.addresses)


def _report(task: asyncio.Task[None]) -> None:
    """A follower ends by being cancelled only."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a source is not followed any more", exc_info=error)
