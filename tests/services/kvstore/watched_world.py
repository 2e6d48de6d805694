"""The world with what keeps blocks, bounds them and tells of them: pins, tenants and watchers.

It knows what was pinned and until when; what watchers know is compared with what is sealed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.kvstore_watch import KnownKeys
from services.kvstore.block import BlockState
from services.kvstore.feed import Feed, NewsKind
from services.kvstore.index import BlockIndex
from services.kvstore.lower_tier import LowerTier
from services.kvstore.tiers import Promoted
from services.kvstore.watching import to_wire
from tests.services.kvstore.store_below import Copying
from tests.services.kvstore.store_ledger import MAX_PINNED, TENANT_NUM_BYTES, Life
from tests.services.kvstore.store_world import Habits, World

PIECE = 2  # keys in a message: snapshots take several


@dataclass(slots=True, kw_only=True)
class Pinned:
    """What one Pin promised: keys and where their blocks are."""

    owner: str
    pin_id: int
    deadline: float
    offsets: dict[bytes, int]


class Follower:
    """A watcher of one store: its streams, message by message, and what it knows."""

    def __init__(self) -> None:
        self.known = KnownKeys()
        self.kinds: list[NewsKind] = []

    def begin(self, index: BlockIndex, life: str) -> None:
        """A new stream, of the life it knows or of another one."""
        request = self.known.begin()
        is_known = request.life == life
        blocks = index._blocks
        self._feed = Feed(blocks, request.from_sequence if is_known else 0, max_keys=PIECE)
        self._life = life

    def step(self) -> bool:
        """Takes a message; False when there is none."""
        news = self._feed.next()
        if news is None:
            return False
        assert sum(len(change.keys) for change in news.changes) <= PIECE
        self.kinds.append(news.kind)
        self.known.apply(to_wire(news, self._life))
        return True

    def catch_up(self) -> set[bytes]:
        """Takes all messages; the keys known then."""
        while self.step():
            pass
        assert self.known.is_current, "a watcher that was told everything is not current"
        return {key.rstrip(b"\0") for key in self.known}


def sealed_keys(index: BlockIndex) -> set[bytes]:
    """Public sealed blocks in memory, by looking at every row."""
    blocks = index._blocks
    return {
        blocks.name_of(row).rstrip(b"\0")
        for row in blocks.named().tolist()
        if blocks.state.at[row] == BlockState.SEALED and not blocks.is_private.at[row]
    }


def copied_keys(index: BlockIndex, tier: LowerTier) -> set[bytes]:
    """Blocks with a whole copy in a lower tier, the same way."""
    blocks = index._blocks
    return {blocks.name_of(r).rstrip(b"\0") for r in blocks.named().tolist() if tier.has(r)}


def known_keys(index: BlockIndex) -> set[bytes]:
    """What watchers are to know: blocks with any place."""
    return sealed_keys(index).union(*(copied_keys(index, tier) for tier in index.lower.all))


class WatchedWorld(World):
    """Pins by id, and two watchers: one that takes every message, and one that is slow."""

    def __init__(self, habits: Habits) -> None:
        self.pinned: list[Pinned] = []
        self.prompt, self.slow = Follower(), Follower()
        super().__init__(habits)

    def begin(self) -> Life:
        """Pins end with a life; watchers go on with the next one."""
        life = super().begin()
        self.pinned = []
        for follower in (self.prompt, self.slow):
            follower.begin(life.index, life.name)
        return life

    def pin(self, owner: str, keys: Sequence[bytes], ttl_s: float) -> None:
        """Pins the sealed prefix, or a part of it."""
        index = self.life.index
        num_pinned, pin_id = index.pin(owner, keys, ttl_s=ttl_s)
        assert bool(num_pinned) is bool(pin_id)
        if not num_pinned:
            return
        assert set(keys[:num_pinned]) <= known_keys(index), "what is not there was pinned"
        offsets = {key: self._offset_of(key) for key in keys[:num_pinned]}
        self.pinned.append(
            Pinned(owner=owner, pin_id=pin_id, deadline=self.now + ttl_s, offsets=offsets)
        )
        self.reached["pinned"] += 1

    def unpin(self, pinned: Pinned) -> None:
        """Ends a pin that is live, and no other."""
        self.pinned.remove(pinned)
        index = self.life.index
        assert not index.unpin("another", pinned.pin_id), "another's pin was ended"
        is_ended = index.unpin(pinned.owner, pinned.pin_id)
        assert is_ended is (self.now < pinned.deadline), "a pin ended at another time"
        self.reached["unpinned" if is_ended else "a pin expired"] += 1

    def drop_corrupt(self, keys: Sequence[bytes]) -> None:
        """What is corrupt goes, pinned or not."""
        super().drop_corrupt(keys)
        for pinned in self.pinned:
            for key in keys:
                self.reached["dropped a pinned block"] += pinned.offsets.pop(key, None) is not None

    def end_promotion(self, copying: Copying, outcome: Promoted) -> None:
        """What the tier does not have after all is not pinned any more."""
        super().end_promotion(copying, outcome)
        if outcome is Promoted.UNUSABLE:
            for pinned in self.pinned:
                pinned.offsets.pop(copying.write.key, None)

    def end_owner(self, owner: str, is_known: bool) -> None:
        """Its pins end too if it is known to be gone, else by their deadline."""
        super().end_owner(owner, is_known)
        self.pinned = [p for p in self.pinned if not is_known or p.owner != owner]

    def break_stream(self) -> None:
        """The slow watcher must watch anew, wherever it was."""
        self.slow.begin(self.life.index, self.life.name)

    def check(self) -> None:
        """Asserts also that pins hold, that tenants keep to their quota, that watchers know all."""
        super().check()
        index, blocks = self.life.index, self.life.index._blocks
        known = known_keys(index)
        for pinned in self.pinned:
            if self.now < pinned.deadline:
                for key, offset in pinned.offsets.items():
                    is_there = key in known if offset < 0 else self._offset_of(key) == offset
                    assert is_there, "a pinned block was evicted"
        num_bytes: dict[int, int] = {}
        for row in blocks.named().tolist():
            if blocks.state.at[row]:
                tenant = blocks.tenant.at[row]
                num_bytes[tenant] = num_bytes.get(tenant, 0) + blocks.num_bytes.at[row]
        assert max(num_bytes.values(), default=0) <= TENANT_NUM_BYTES, "a tenant is over its quota"
        assert index.counts().pinned_num_bytes <= MAX_PINNED * self.life.slots.num_bytes
        assert self.prompt.catch_up() == known, "a watcher knows other keys"

    def quiesce(self) -> None:
        """Asserts also that no pin is left, and that the slow watcher can catch up."""
        super().quiesce()
        assert not self.life.index.counts().num_pins
        assert self.slow.catch_up() == known_keys(self.life.index)
        kinds = self.slow.kinds
        pairs = itertools.pairwise(kinds)
        self.reached["fell behind in a snapshot"] += (NewsKind.SNAPSHOT, NewsKind.RESET) in pairs
        self.reached["followed"] += NewsKind.CHANGES in kinds

    def _offset_of(self, key: bytes) -> int:
        """Where a sealed block is; -1: it is in a lower tier only, or nowhere."""
        blocks = self.life.index._blocks
        row = blocks.row_of(key)
        return blocks.offset.at[row] if blocks.state.at[row] == BlockState.SEALED else -1
