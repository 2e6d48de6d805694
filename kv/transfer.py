"""A block's journey as the rest of the code sees it: agents, spans and the Transfer protocol.

Owns bounds checks and the merging of spans. Knows no library; never moves a byte itself.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kv.path import Transport

Offsets = NDArray[np.uint64]
Positions = Sequence[int] | NDArray[np.integer[Any]]
OnLate = Callable[["asyncio.Future[None]"], None]
MAX_SPAN_NUM_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """One process's transfer agent and its registered arena; mirrors kvmesh.v1.Agent.

    The name's bytes lie at name_address in the memory of process pid.
    """

    name: str
    nixl_version: str
    metadata: bytes
    arena_address: int
    arena_num_bytes: int
    incarnation: str
    host_id: str
    pid: int = 0
    name_address: int = 0
    transports: tuple[Transport, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Runs of bytes to move: offsets from the start of each arena and lengths, [num_spans] each."""

    local_offsets: Offsets
    remote_offsets: Offsets
    lengths: Offsets

    def __len__(self) -> int:
        return len(self.lengths)


class Transfer(Protocol):
    """Moves bytes between this process's arena and its peers' arenas. All on one event loop."""

    @property
    def agent(self) -> Agent:
        """This process's agent."""
        ...

    async def connect(self, agent: Agent) -> None:
        """Makes a peer reachable. PeerVersionMismatch before anything is loaded; TransferError."""
        ...

    async def disconnect(self, name: str) -> None:
        """Forgets a peer; its transfers end with TransferError. Unknown names are ignored."""
        ...

    async def read(
        self,
        peer_name: str,
        local_offsets: Positions,
        remote_offsets: Positions,
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate | None = None,
    ) -> None:
        """Copies num_bytes at each remote offset to the local offset of the same index.

        ValueError: a run leaves either arena. TransferError: it failed and is over. TransferTimeout
        after deadline_s seconds. On timeout, and on cancellation while bytes may still arrive,
        `on_late(settled)` is called before this raises.
        """
        ...

    async def write(
        self,
        peer_name: str,
        local_offsets: Positions,
        remote_offsets: Positions,
        num_bytes: int,
        deadline_s: float,
        on_late: OnLate | None = None,
    ) -> None:
        """Copies the other way; otherwise like `read`."""
        ...

    def close(self) -> None:
        """Ends the agent; waits a few seconds at most."""
        ...


def spans(
    local_offsets: Positions,
    remote_offsets: Positions,
    num_bytes: int,
    *,
    local_num_bytes: int,
    remote_num_bytes: int,
) -> Spans:
    """Checks runs of num_bytes against both arenas and merges those adjacent on both sides.

    Spans come out in the order of local offsets and are never longer than MAX_SPAN_NUM_BYTES.
    ValueError names the offset and the arena.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes: {num_bytes}; at least 1")
    local = _checked("local_offsets", local_offsets, num_bytes, local_num_bytes)
    remote = _checked("remote_offsets", remote_offsets, num_bytes, remote_num_bytes)
    if len(local) != len(remote):
        raise ValueError(f"local_offsets: {len(local)} entries; remote_offsets has {len(remote)}")
    order = np.argsort(local, kind="stable")
    return _chop(_merge(local[order], remote[order], num_bytes))


def group(whole: Spans, max_num_bytes: int) -> list[Spans]:
    """Cuts a list of spans into lists of less than max_num_bytes plus one span each, in order."""
    if len(whole) == 0:
        return []
    starts = np.cumsum(whole.lengths) - whole.lengths
    edges = np.flatnonzero(np.diff(starts // np.uint64(max_num_bytes))) + 1
    bounds = [0, *edges.tolist(), len(whole)]
    return [
        Spans(
            local_offsets=whole.local_offsets[first:last],
            remote_offsets=whole.remote_offsets[first:last],
            lengths=whole.lengths[first:last],
        )
        for first, last in itertools.pairwise(bounds)
    ]


def _checked(name: str, values: Positions, num_bytes: int, arena_num_bytes: int) -> Offsets:
    raw = np.asarray(values)
    if raw.ndim != 1:
        raise ValueError(f"{name}: shape {raw.shape}; one dimension")
    if len(raw) == 0:
        return np.zeros(0, dtype=np.uint64)
    if raw.dtype.kind not in "iu":
        raise ValueError(f"{name}: dtype {raw.dtype}; integers in [0, 2**63)")
    # Compared without adding: offset + num_bytes may overflow.
    bad = (raw < 0) | (raw > arena_num_bytes - num_bytes)
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{name}[{index}]: {raw[index]}; a run of {num_bytes} bytes must lie in an arena of "
            f"{arena_num_bytes} bytes"
        )
    return raw.astype(np.uint64)


def _merge(local: Offsets, remote: Offsets, num_bytes: int) -> Spans:
    step = np.uint64(num_bytes)
    apart = (np.diff(local) != step) | (np.diff(remote) != step)
    firsts = np.concatenate(([0], np.flatnonzero(apart) + 1)) if len(local) else np.zeros(0, int)
    counts = np.diff(np.append(firsts, len(local)))
    return Spans(
        local_offsets=local[firsts],
        remote_offsets=remote[firsts],
        lengths=counts.astype(np.uint64) * step,
    )


def _chop(whole: Spans) -> Spans:
    """Cuts spans longer than MAX_SPAN_NUM_BYTES, so that a transfer can be cut into parts."""
    limit = np.uint64(MAX_SPAN_NUM_BYTES)
    if len(whole) == 0 or whole.lengths.max() <= limit:
        return whole
    counts = -(-whole.lengths.astype(np.int64) // MAX_SPAN_NUM_BYTES)
    source = np.repeat(np.arange(len(whole)), counts)
    within = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    shift = within.astype(np.uint64) * limit
    return Spans(
        local_offsets=whole.local_offsets[source] + shift,
        remote_offsets=whole.remote_offsets[source] + shift,
        lengths=np.minimum(limit, whole.lengths[source] - shift),
    )
