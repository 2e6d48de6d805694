"""An index of a few slots, with short words for long sequences; checks after each of them."""

from __future__ import annotations

from typing import Any

from services.kvstore.arena import SlotAllocator
from services.kvstore.block import LeaseOutcome, Reserved
from services.kvstore.index import BlockIndex
from services.kvstore.lower_tier import LowerTier, Move
from tests.services.kvstore.promotions import promote

SIZE = 4096


class Clock:
    """A clock that tests turn by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Store:
    """An index of a few slots, with short words for long sequences; checks after each of them."""

    def __init__(self, num_slots: int = 4, **options: Any) -> None:
        self.clock = Clock()
        self.slots = SlotAllocator(num_slots * SIZE)
        self.index = BlockIndex(self.slots, clock=self.clock, **options)

    def reserve(
        self,
        keys: str,
        *,
        owner: str = "w",
        ttl_s: float = 10,
        private: bool = False,
        tenant: str = "",
    ) -> list[Reserved]:
        names = [key.encode() for key in keys]
        answers = self.index.reserve(
            owner, names, SIZE, ttl_s=ttl_s, is_private=private, tenant=tenant
        )
        self.index.check()
        return answers

    def put(self, keys: str, *, private: bool = False, tenant: str = "") -> list[int]:
        answers = self.reserve(keys, private=private, tenant=tenant)
        ids = [answer.reservation_id for answer in answers]
        assert self.index.seal("w", ids, range(len(ids))) == [True] * len(ids)
        self.index.check()
        return ids

    def lookup(self, keys: str, *, ttl_s: float = 10) -> tuple[int, int]:
        leased = self.index.lookup("r", [key.encode() for key in keys], SIZE, ttl_s=ttl_s)
        self.index.check()
        return leased.lease_id, len(leased.blocks)

    def release(self, lease_id: int) -> LeaseOutcome:
        outcome = self.index.release("r", lease_id)
        self.index.check()
        return outcome

    def pin(self, keys: str, *, owner: str = "p", ttl_s: float = 10) -> tuple[int, int]:
        answer = self.index.pin(owner, [key.encode() for key in keys], ttl_s=ttl_s)
        self.index.check()
        return answer

    def unpin(self, pin_id: int, *, owner: str = "p") -> bool:
        is_ended = self.index.unpin(owner, pin_id)
        self.index.check()
        return is_ended

    @property
    def disk(self) -> LowerTier:
        assert self.index.lower.disk is not None
        return self.index.lower.disk

    def demote(self) -> None:
        """Copies all that is queued to all lower tiers."""
        for tier in self.index.lower.all:
            while (move := tier.next_demotion()) is not None:
                tier.demoted(move, is_written=True)
                self.index.check()

    def promote(self, keys: str) -> tuple[list[Move], list[int]]:
        """Begins to read blocks back, from any tier."""
        lower = self.index.lower
        return promote(lower, [key.encode() for key in keys], SIZE, lower.all)

    def sealed(self, keys: str) -> str:
        """Those of the keys that are sealed, without touching their order of use."""
        blocks = self.index._blocks
        return "".join(k for k in keys if blocks.state.at[blocks.row_of(k.encode())])


def outcomes(answers: list[Reserved]) -> list[str]:
    return [answer.outcome.name for answer in answers]
