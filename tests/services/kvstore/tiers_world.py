"""What lies where in all tiers of one store, by content: the world of test_tiers_model.py."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from hypothesis.stateful import RuleBasedStateMachine

from services.kvstore.arena import SlotAllocator
from services.kvstore.disk_format import file_num_bytes
from services.kvstore.index import BlockIndex
from services.kvstore.lower_tier import LowerTier, Move
from tests.services.kvstore.watched_world import Follower, copied_keys, sealed_keys

SIZE, NUM_SLOTS, NUM_HOST, NUM_FILES = 4096, 5, 3, 6
FLIPPED = b"flipped"


class TiersWorld(RuleBasedStateMachine):
    """`slots`, `host` and `files` are what lies where; a content is the key that was written."""

    reached: ClassVar[Counter[str] | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.slots: dict[int, bytes] = {}
        self.host: dict[int, bytes] = {}
        self.files: dict[bytes, bytes] = {}
        self.leases: dict[int, dict[int, bytes]] = {}
        self.writes: list[Move] = []
        self.reads: list[Move] = []
        self.arrived: list[Move] = []
        self.pinned: dict[int, set[bytes]] = {}
        self.follower, self.num_lives = Follower(), 1
        self.index = self.fresh_index(first_id=1)
        self.follower.begin(self.index, "1")

    def fresh_index(self, first_id: int) -> BlockIndex:
        return BlockIndex(
            SlotAllocator(NUM_SLOTS * SIZE),
            clock=lambda: self.now,
            private_ttl_s=20,
            quarantine_s=30,
            first_id=first_id,
            host_num_bytes=NUM_HOST * SIZE,
            disk_num_bytes=NUM_FILES * file_num_bytes(SIZE),
            tenant_num_bytes=4 * SIZE,
            num_changes=16,
        )

    def lose_pins(self, keys: list[bytes]) -> None:
        """Corrupt blocks go, pinned or not; those on their way back stay."""
        self.remove_files()
        for pinned in self.pinned.values():
            pinned -= set(keys) - sealed_keys(self.index) - set(self.files) - self.in_host()

    @property
    def disk(self) -> LowerTier:
        assert self.index.lower.disk is not None
        return self.index.lower.disk

    def in_host(self) -> set[bytes]:
        """Keys with a whole copy in DRAM, as the books have it."""
        assert self.index.lower.host is not None
        return copied_keys(self.index, self.index.lower.host)

    def known(self) -> list[bytes]:
        """Keys that may lie below."""
        return sorted({*self.files, *self.host.values()} - {FLIPPED, b"half written"})

    def copy_of(self, move: Move) -> bytes:
        """What a tier has for a move."""
        if move.tier is self.disk:
            return self.files[move.header.key]
        return self.host[move.copy_offset]

    def moves(self) -> list[Move]:
        return [*self.writes, *self.reads, *self.arrived]

    def remove_files(self) -> None:
        for key in self.disk.take_removed():
            del self.files[key]
            self.note("removed")

    def note(self, what: str) -> None:
        if self.reached is not None:
            self.reached[what] += 1
