"""What stores grant to one publish: slots, and the parts in which blocks go into them.

Owns no call and no transfer; whoever has a slot gives it back.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from mesh.kvstore_shard import Shard
from mesh.kvstore_shards import Deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where a life of a store wants a block, until expires_at on the monotonic clock."""

    shard: Shard
    life: str
    reservation_id: int
    offset: int
    expires_at: float

    def holds_until(self, deadline: Deadline) -> bool:
        """Whether a WRITE that ends by the deadline still finds it reserved."""
        ends_at = time.monotonic() + deadline.remaining_s
        is_member = self.shard.life == self.life and not self.shard.has_left
        return is_member and ends_at < self.expires_at


@dataclass(slots=True, kw_only=True)
class Part:
    """Blocks on their way to one life of a store; `indices`: positions among the publish's keys."""

    shard: Shard
    life: str
    indices: list[int]
    slots: list[Slot]
    is_written: bool = False
    is_closed: bool = False
    late: asyncio.Future[None] | None = None

    @property
    def reservation_ids(self) -> list[int]:
        """Of the slots, in order."""
        return [slot.reservation_id for slot in self.slots]


@dataclass(slots=True, kw_only=True)
class Grant:
    """One store's answer: slots and blocks sealed already, by position among the keys."""

    slots: dict[int, Slot] = field(default_factory=dict)
    sealed: set[int] = field(default_factory=set)
