"""One life of a store as a worker has connected it.

Owns its NIXL peer's end, and the word that it has ended; whoever reconnects makes the next one.
"""

from __future__ import annotations

import asyncio
import logging

from kv.errors import TransferError
from kv.path import KvPath
from kv.transfer import Agent, Transfer

log = logging.getLogger("kvmesh.kvstore")

_DROP_TIMEOUT_S = 2.0


class Connection:
    """The store's agent and the path to it. `after` is one whose NIXL peer serves on."""

    def __init__(
        self, *, agent: Agent, path: KvPath, transfer: Transfer, after: Connection | None = None
    ) -> None:
        self.agent = agent
        self.path = path
        self.is_cut = after.is_cut if after is not None else asyncio.Event()
        self._transfer = transfer

    async def cut_off(self) -> None:
        """Drops the NIXL peer, once; transfers with it end. Waits 2 s at most."""
        if self.is_cut.is_set():
            return
        try:
            async with asyncio.timeout(_DROP_TIMEOUT_S):
                await self._transfer.disconnect(self.agent.name)
        except (TransferError, TimeoutError) as error:
            log.debug("kvstore %s: disconnect: %s", self.agent.name, error)
        finally:
            self.is_cut.set()
