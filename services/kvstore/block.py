"""The values of the block index: blocks, leases and what its operations answer.

Owns their fields; the index owns their changes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class BlockState(enum.Enum):
    """Life of a slot's content: RESERVED -> SEALED -> DROPPED, or RESERVED -> QUARANTINED."""

    RESERVED = enum.auto()
    SEALED = enum.auto()
    QUARANTINED = enum.auto()  # its writer may still write: not in the index, slot not reused
    DROPPED = enum.auto()  # not in the index; the slot waits for the last lease


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


@dataclass(slots=True, kw_only=True, eq=False)
class Block:
    """One slot's content. Mutable; only the index changes it."""

    key: bytes
    offset: int
    num_bytes: int
    owner: str
    reservation_id: int
    is_private: bool
    parent: bytes | None = None
    state: BlockState = BlockState.RESERVED
    digest: int = 0
    num_leases: int = 0
    last_used: int = 0

    def is_readable_as(self, num_bytes: int) -> bool:
        """Whether a reader of blocks of num_bytes may be pointed at it."""
        return self.state is BlockState.SEALED and self.num_bytes == num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A read lease: its blocks' slots are not reused while it lives."""

    owner: str
    blocks: tuple[Block, ...]


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

    @classmethod
    def of(cls, block: Block) -> LeasedBlock:
        """What a reader may know of a block."""
        return cls(offset=block.offset, num_bytes=block.num_bytes, digest=block.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """The longest sealed prefix; lease_id is 0 when it is empty."""

    lease_id: int
    blocks: tuple[LeasedBlock, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexCounts:
    """Numbers of things the index holds."""

    num_sealed: int
    num_reserved: int
    num_private: int
    num_quarantined: int
    num_dropped: int
    num_leases: int
