"""The store's machine with a tier in DRAM: copies are made, read back and lost at any time.

It must find broken habits of tiers, too; test_store_machine.py has those of the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from services.kvstore.expiry import Due
from services.kvstore.index import BlockIndex
from services.kvstore.lower_tier import LowerTier
from services.kvstore.tiers import Promoted
from tests.services.kvstore.store_below import Copying
from tests.services.kvstore.store_world import Habits
from tests.services.kvstore.test_store_machine import (
    NUM_STEPS,
    STEPS,
    Draw,
    StoreMachine,
    run_machine,
)


class TieredMachine(StoreMachine):
    """The same, and copies."""

    steps: ClassVar[Sequence[str]] = (
        *STEPS,
        *("begin_demotion", "begin_promotion", "end_demotion", "end_promotion") * 3,
    )

    def things(self) -> dict[str, Sequence[Any] | bool]:
        return {
            **super().things(),
            "begin_promotion": self.world.below.copied(),
            "end_demotion": self.world.below.demotions,
            "end_promotion": self.world.below.promotions,
        }

    def begin_demotion(self, draw: Draw) -> None:
        self.world.below.begin_demotion()

    def end_demotion(self, draw: Draw, copying: Copying) -> None:
        self.world.below.end_demotion(copying, draw(st.sampled_from([True, True, True, False])))

    def begin_promotion(self, draw: Draw, key: bytes) -> None:
        """Of a block that eviction took, usually."""
        self.world.life.index.evict(draw(st.sampled_from([0, 2, 3])))
        self.world.begin_promotion([key])

    def end_promotion(self, draw: Draw, copying: Copying) -> None:
        self.world.end_promotion(copying, draw(st.sampled_from([Promoted.DONE, *Promoted])))


TestTieredMachine = TieredMachine.TestCase
TestTieredMachine.settings = settings(max_examples=30, stateful_step_count=NUM_STEPS, deadline=None)


class KeepsCopies(BlockIndex):
    """Drops a corrupt block from the arena alone, and audits nothing."""

    def check(self) -> None:
        pass

    def _drop(self, row: int) -> None:
        self._deadlines.cancel(Due.PRIVATE, self._blocks.reservation_id.at[row])
        self._memory.drop(row)

    def _forget_copies(self, key: bytes) -> bool:
        return False


class ForgetsLeft(BlockIndex):
    """Takes no report of a block that has left the arena meanwhile."""

    def _forget_copies(self, key: bytes) -> bool:
        return False


class HoldsNothing(BlockIndex):
    """Lets slots go while they are copied, and audits no holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tier = _host(self)
        begin, end = tier.next_demotion, tier.demoted

        def next_demotion() -> Any:
            move = begin()
            if move is not None:
                self._memory.unhold(np.array([move.row]))
            return move

        def demoted(move: Any, is_written: bool) -> None:
            self._memory.hold(np.array([move.row]))
            end(move, is_written)

        tier.next_demotion, tier.demoted = next_demotion, demoted

    def check(self) -> None:
        pass


def _host(index: BlockIndex) -> LowerTier:
    assert index.lower.host is not None
    return index.lower.host


MUTANTS = {
    "a reported block keeps its copies": (
        Habits(index_type=KeepsCopies),
        "a reported block has a copy",
    ),
    "a report comes after eviction for nothing": (
        Habits(index_type=ForgetsLeft),
        "a reported block has a copy",
    ),
    "a slot goes while it is copied": (
        Habits(index_type=HoldsNothing),
        "a slot was reused while it was copied|other bytes",
    ),
    "a block is given out before it has come": (Habits(awaits=False), "sealed unwritten"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_finds(name: str) -> None:
    habits, complaint = MUTANTS[name]
    with pytest.raises(AssertionError, match=complaint):
        run_machine(habits, num_examples=600, base=TieredMachine)


def test_the_machine_reaches_what_it_is_about() -> None:
    reached = run_machine(Habits(), num_examples=150, base=TieredMachine)
    ends = {outcome.removesuffix(" damaged") for outcome in reached}
    assert ends >= {"used", "found corrupt", "DONE", "UNUSABLE", "ABANDONED"}, reached
