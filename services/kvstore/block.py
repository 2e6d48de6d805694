"""The values of the block index: states and what its operations answer.

Owns their fields; the index owns their changes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class BlockState(enum.IntEnum):
    """What is in a block's slot: RESERVED or PROMOTING, then SEALED; DROPPED is the end."""

    ABSENT = 0  # no slot: the block is in lower tiers only, or others name it as their parent
    RESERVED = enum.auto()
    PROMOTING = enum.auto()  # the store itself is writing it, from a lower tier
    SEALED = enum.auto()
    DROPPED = enum.auto()  # not in the index; the slot waits for the last hold


class CopyState(enum.IntEnum):
    """Whether a block has a copy in a lower tier."""

    ABSENT = 0
    WRITING = enum.auto()
    PRESENT = enum.auto()


class Place(enum.IntEnum):
    """Where a block is that the store has, fastest first: a sealed public one, or one with a copy.

    MEMORY is the arena, be it in DRAM or a GPU's; HOST the DRAM behind it.
    """

    NONE = 0
    MEMORY = enum.auto()
    HOST = enum.auto()  # there and not in the arena
    DISK = enum.auto()  # only there


class ReserveOutcome(enum.Enum):
    """What became of one key of Reserve."""

    RESERVED = enum.auto()
    ALREADY_SEALED = enum.auto()
    ALREADY_RESERVED = enum.auto()
    FULL = enum.auto()


class LeaseOutcome(enum.Enum):
    """Whether a lease held until it was released."""

    HELD = enum.auto()
    EXPIRED = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Answer for one reserved key; id and offset are 0 unless RESERVED."""

    outcome: ReserveOutcome
    reservation_id: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedBlock:
    """Where a leased block is and what its bytes must hash to."""

    offset: int
    num_bytes: int
    digest: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leased:
    """The longest sealed prefix: where its blocks are and what their bytes must hash to.

    lease_id is 0 when the prefix is empty. num_promoted of the blocks came back from below for it.
    """

    lease_id: int
    num_bytes: int
    offsets: NDArray[np.int64]  # [num_blocks]
    digests: NDArray[np.uint64]  # [num_blocks]
    num_promoted: int = 0

    @property
    def blocks(self) -> tuple[LeasedBlock, ...]:
        """The same, block by block."""
        pairs = zip(self.offsets.tolist(), self.digests.tolist(), strict=True)
        return tuple(
            LeasedBlock(offset=offset, num_bytes=self.num_bytes, digest=digest)
            for offset, digest in pairs
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexCounts:
    """Numbers of things the index holds, in the arena where the name says no other place."""

    num_sealed: int
    num_reserved: int
    num_private: int
    num_quarantined: int
    num_dropped: int
    num_leases: int
    num_pins: int
    pinned_num_bytes: int
    num_promoting: int
    num_in_host: int
    num_on_disk: int
    host_num_bytes: int
    disk_num_bytes: int
    num_evicted: Mapping[str, int]  # from the arena so far, by cause
    num_expired: Mapping[str, int]  # leases, reservations and pins so far
