"""Which stores a worker asks. They come and go while it runs.

Owns each store's connection and its end: one that left gets no new requests; what is under way with
it ends first, then its connection. Never decides who the members are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from mesh.kvstore_shard import RPC_TIMEOUT_S, Shard

log = logging.getLogger("kvmesh.kvstore")

# Longer than a store's promises last: slots of a prompt that is being computed, 125 s.
_LEAVE_S = 130.0


class Members:
    """`follow` on the loop, as often as they change; `close` at the end."""

    def __init__(self, make: Callable[[str], Shard]) -> None:
        self.shards: dict[str, Shard] = {}  # by address; one object for life, others read it
        self._make = make
        self._runs: dict[Shard, asyncio.Task[None]] = {}  # of all that are not closed
        self._leaving: dict[str, tuple[Shard, asyncio.Task[None]]] = {}  # still connected
        self._closing: dict[str, asyncio.Task[None]] = {}

    @property
    def states(self) -> dict[str, str]:
        """Address to connecting, up, down or leaving."""
        states = dict.fromkeys([*self._leaving, *self._closing], "leaving")
        return states | {address: shard.state.value for address, shard in self.shards.items()}

    @property
    def paths(self) -> dict[str, str]:
        """Address to read or write, of members that have been connected."""
        shards = self.shards.items()
        return {address: shard.path.value for address, shard in shards if shard.path is not None}

    def follow(self, addresses: Iterable[str]) -> None:
        """These are the members from now on; new ones are connected in the background."""
        wanted = dict.fromkeys(addresses)
        for address in [address for address in self.shards if address not in wanted]:
            shard = self.shards.pop(address)
            shard.has_left = True
            self._leaving[address] = (shard, asyncio.ensure_future(self._leave(shard)))
            log.info("kvstore %s: leaves, %d uses under way", address, len(shard.uses))
        for address in wanted:
            if address not in self.shards:
                self.shards[address] = self._join(address)

    async def close(self) -> None:
        """Ends all connections at once."""
        ends = [task for _, task in self._leaving.values()]
        await _cancel([*ends, *self._closing.values()])
        await _cancel(list(self._runs.values()))
        await asyncio.gather(*(shard.close() for shard in self._runs))
        self._runs.clear()

    def _join(self, address: str) -> Shard:
        if address in self._leaving:  # it comes back before it was gone
            shard, leave = self._leaving.pop(address)
            leave.cancel()
            shard.has_left = False
            return shard
        shard = self._make(address)
        self._runs[shard] = asyncio.ensure_future(self._run(shard, self._closing.get(address)))
        return shard

    async def _run(self, shard: Shard, before: asyncio.Task[None] | None) -> None:
        """A predecessor on the same address ends first: its end would cut the new connection."""
        if before is not None:
            await asyncio.wait([before])
        await shard.run()

    async def _leave(self, shard: Shard) -> None:
        """Waits for what is under way, then ends the connection."""
        address = shard.address
        if not await shard.uses.gone(_LEAVE_S):
            log.warning("kvstore %s: %d uses do not end; cut off", address, len(shard.uses))
        _, this = self._leaving.pop(address)
        before = self._closing.get(address)
        self._closing[address] = this
        try:
            if before is not None:
                await asyncio.wait([before])
            await _cancel([self._runs[shard]])
            lives = {other.life for other in self.shards.values()}  # one may have two addresses
            await shard.disconnect(keeps_peer=shard.life in lives)
            # A late transfer ended with the peer: its acknowledgement still goes out.
            await shard.uses.gone(2 * RPC_TIMEOUT_S)
            await shard.close()
            del self._runs[shard]
        finally:
            if self._closing[address] is this:
                del self._closing[address]
        log.info("kvstore %s: left", address)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
