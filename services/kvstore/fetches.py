"""Blocks that the store itself WRITEs to readers whose READ is not one-sided (kv/path.py).

Owns the holds on slots while a WRITE reads them, and which readers the store's agent knows: one
from its first Fetch on, until it connects anew, its path breaks or it is silent for long. Writes
only into the arena of the agent that the caller itself has told in Connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Sequence

from kv.errors import TransferError, TransferTimeout
from kv.transfer import Agent, Transfer
from mesh.telemetry import Telemetry
from services.kvstore.index import BlockIndex
from services.kvstore.leases import Use
from services.kvstore.validation import check_inside, check_local_offsets

log = logging.getLogger("kvmesh.kvstore")


class FetchOutcome(enum.Enum):
    """What became of a WRITE that is over."""

    WRITTEN = "written"
    EXPIRED = "expired"
    BROKEN = "broken"


class Fetches:
    """All WRITEs to readers. One that has begun goes on when its caller is gone."""

    def __init__(self, *, index: BlockIndex, transfer: Transfer, telemetry: Telemetry) -> None:
        self._index = index
        self._transfer = transfer
        self._instruments = telemetry.instruments
        self._writes: set[asyncio.Task[FetchOutcome]] = set()

    async def fetch(
        self, reader: Agent, lease_id: int, local_offsets: Sequence[int], deadline_s: float
    ) -> FetchOutcome:
        """WRITEs the first blocks of a lease to the reader's offsets; returns when that is over.

        InvalidArgument: more offsets than blocks, or one outside the reader's arena.
        """
        self._index.expire()
        leases = self._index.leases
        lease = leases.live.get(lease_id)
        if lease is None or lease.owner != reader.incarnation:
            return FetchOutcome.EXPIRED
        check_local_offsets(local_offsets, len(lease.rows))
        use = leases.begin_use(lease_id, len(local_offsets))
        try:
            check_inside("local_offsets", local_offsets, use.num_bytes, reader.arena_num_bytes)
        except BaseException:
            leases.end_use(use)
            raise
        write = asyncio.ensure_future(self._write(reader, use, local_offsets, deadline_s))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        return await asyncio.shield(write)

    async def forget(self, agent_name: str) -> None:
        """Ends what goes on with a reader: no more bytes are sent to it."""
        with contextlib.suppress(TransferError):
            await self._transfer.disconnect(agent_name)

    async def _write(
        self, reader: Agent, use: Use, local_offsets: Sequence[int], deadline_s: float
    ) -> FetchOutcome:
        started_at = time.monotonic()
        try:
            await self._transfer.connect(reader)
            left_s = max(0.0, started_at + deadline_s - time.monotonic())
            await self._transfer.write(
                reader.name, use.offsets, local_offsets, use.num_bytes, left_s
            )
        except TransferError as error:
            log.warning("a Fetch of %d blocks broke: %s", len(use.rows), error)
            await self.forget(reader.name)  # a WRITE cannot be cancelled, its path can be cut
            if isinstance(error, TransferTimeout):
                await asyncio.wait([error.settled])
            return FetchOutcome.BROKEN
        finally:
            self._index.leases.end_use(use)
        attributes = {"direction": "fetch"}
        duration_s = time.monotonic() - started_at
        self._instruments.kv_transfer_duration.record(duration_s, attributes)
        self._instruments.kv_transfer_io.add(len(use.rows) * use.num_bytes, attributes)
        return FetchOutcome.WRITTEN
