"""What the store promised: reservations with their WRITEs, leases with their READs, by life."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.kvstore.arena import DramArena, SlotAllocator
from services.kvstore.index import BlockIndex

SIZE, NUM_SLOTS, NUM_HOST, NUM_PARTS = 64, 3, 2, 2
PRIVATE_TTL_S, QUARANTINE_S = 20.0, 30.0
TENANT_NUM_BYTES, MAX_PINNED = 2 * SIZE, 0.4
NUM_CHANGES = 4  # so few that watchers fall behind


class State(enum.Enum):
    """Whom a slot is promised to: its writer, all readers, nobody."""

    OPEN = enum.auto()
    SEALED = enum.auto()
    ENDED = enum.auto()


@dataclass(eq=False, slots=True, kw_only=True)
class Write:
    """A reservation, and the WRITE into its slot of which num_landed parts have arrived."""

    life: Life
    owner: str
    key: bytes
    offset: int
    num_bytes: int
    reservation_id: int
    deadline: float
    state: State = State.OPEN
    num_landed: int = 0
    is_over: bool = False  # nothing more of it can arrive
    is_damaged: bool = False

    @property
    def content(self) -> bytes:
        """What the key stands for."""
        return hashlib.shake_128(self.key).digest(self.num_bytes)

    @property
    def digest(self) -> int:
        """What the writer seals it with."""
        return digest_of(self.content)

    def is_owned(self, now: float) -> bool:
        """Whether it is the writer's slot: reserved, or in quarantine and not given up for dead."""
        return self.state is State.OPEN and now < self.deadline + QUARANTINE_S

    def overlaps(self, other: Write) -> bool:
        """Whether two slots of one life share bytes."""
        ends = self.offset + self.num_bytes, other.offset + other.num_bytes
        return self.offset < ends[1] and other.offset < ends[0]

    def part(self, number: int) -> slice:
        """Bytes of one part within the block."""
        length = self.num_bytes // NUM_PARTS
        return slice(number * length, (number + 1) * length)


@dataclass(eq=False, slots=True, kw_only=True)
class Read:
    """A lease, and the READ under it: the bytes of each block that came so far."""

    life: Life
    owner: str
    lease_id: int
    deadline: float
    blocks: list[Write]
    copies: list[bytes]
    num_copied: int = 0


@dataclass(eq=False, slots=True, kw_only=True)
class Life:
    """One life of the store: index and memory begin anew. `granted`: whose bytes its slots hold."""

    name: str
    index: BlockIndex
    slots: SlotAllocator
    arena: DramArena
    granted: list[Write] = field(default_factory=list)

    def slot_of(self, write: Write) -> NDArray[np.uint8]:
        """A view of the slot's bytes. [num_bytes]"""
        return self.arena.memory[write.offset : write.offset + write.num_bytes]


def digest_of(data: bytes) -> int:
    """64 bits over the bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
