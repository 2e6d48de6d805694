"""The store's protocol in random order, with real bytes: no reader ever uses a wrong one.

The same machine must find each of the mutants: one habit of the store or of its callers, broken.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.services.kvstore.store_ledger import (
    NUM_PARTS,
    QUARANTINE_S,
    SIZE,
    Read,
    State,
    Write,
)
from tests.services.kvstore.store_mutants import MUTANTS
from tests.services.kvstore.store_world import Habits
from tests.services.kvstore.watched_world import Pinned, WatchedWorld

NUM_STEPS = 150  # long: what breaks a protocol needs a past
WRITERS, READERS = ("w0", "w1"), ("r0", "r1")
CHAINS = [[key.encode() for key in chain] for chain in ("A", "B", "AB", "ABC", "CD", "D", "EA")]
TTLS = (1.0, 4.0, 15.0)
STEPS = (
    *("begin_write", "go_on_writing", "end_write", "begin_read", "go_on_reading", "end_read") * 2,
    *("pass_time", "pass_time", "take_away", "have_trouble", "have_trouble"),
    *("pin", "unpin", "follow"),
)
Draw = Callable[[st.SearchStrategy[Any]], Any]


def one_of_each(*choices: Sequence[object]) -> st.SearchStrategy[Any]:
    """One draw for all: draws are what these tests spend their time on."""
    return st.sampled_from(list(itertools.product(*choices)))


WRITES = one_of_each(
    WRITERS,
    CHAINS,
    (SIZE, SIZE, SIZE, 2 * SIZE),
    TTLS,
    (False, True),
    ("", "tenant"),
    range(NUM_PARTS + 1),
)
READS = one_of_each(READERS, CHAINS, TTLS)
TIMES = one_of_each((0.5, 1.0, 5.0, 5.0, QUARANTINE_S, 2 * QUARANTINE_S), (False, True))
LOSSES = one_of_each(("drop_corrupt", "discard", "evict"), CHAINS)
TROUBLES = one_of_each(("crash", "silence", "flip", "flip", "restart"), WRITERS + READERS)
FOLLOWS = st.sampled_from((1, 1, 2, 5, 0))


class StoreMachine(RuleBasedStateMachine):
    """Every operation of the protocol at any time.

    It has one rule because Hypothesis leaves out a random half of the rules in each example, and
    what breaks a protocol needs many kinds of steps.
    """

    habits: ClassVar[Habits] = Habits(pins=True)
    reached: ClassVar[Counter[str] | None] = None
    steps: ClassVar[Sequence[str]] = STEPS

    def __init__(self) -> None:
        super().__init__()
        self.world = WatchedWorld(self.habits)
        self.incarnations: Counter[str] = Counter()

    @rule(data=st.data())
    def do(self, data: st.DataObject) -> None:
        """One step that has something to act on."""
        things = self.things()
        step = data.draw(st.sampled_from([step for step in self.steps if things.get(step, True)]))
        if isinstance(choices := things.get(step), Sequence):
            getattr(self, step)(data.draw, data.draw(st.sampled_from(choices[-4:])))
        else:
            getattr(self, step)(data.draw)

    def things(self) -> dict[str, Sequence[Any] | bool]:
        """What the steps act on that need something, or whether they are taken."""
        return {
            "go_on_writing": self._on_the_way(),
            "end_write": self._remembered(),
            "begin_read": self._sealed(),
            "go_on_reading": self.world.reads,
            "end_read": self.world.reads,
            "pin": self._sealed() if self.habits.pins else (),
            "unpin": self.world.pinned,
            "follow": self.habits.pins,
        }

    def begin_write(self, draw: Draw) -> None:
        """Reserves; some parts may arrive at once, and what is whole is sealed."""
        who, keys, num_bytes, ttl_s, is_private, tenant, num_parts = draw(WRITES)
        writes = self.world.reserve(self._owner(who), keys, num_bytes, ttl_s, is_private, tenant)
        for write in writes:
            self.world.land(write, num_parts)
            if num_parts == NUM_PARTS:
                self.world.seal(write)

    def go_on_writing(self, draw: Draw, write: Write) -> None:
        self.world.land(write, draw(st.integers(1, NUM_PARTS)))

    def end_write(self, draw: Draw, write: Write) -> None:
        (self.world.seal if draw(st.booleans()) else self.world.acknowledge)(write)

    def begin_read(self, draw: Draw, first: Write) -> None:
        who, more, ttl_s = draw(READS)
        self.world.look_up(self._owner(who), [first.key, *more], first.num_bytes, ttl_s)

    def go_on_reading(self, draw: Draw, read: Read) -> None:
        self.world.read(read, draw(st.integers(1, NUM_PARTS)))

    def end_read(self, draw: Draw, read: Read) -> None:
        self.world.read(read, draw(st.sampled_from([NUM_PARTS, 0])))
        self.world.release(read)

    def pin(self, draw: Draw, first: Write) -> None:
        who, more, ttl_s = draw(READS)
        self.world.pin(self._owner(who), [first.key, *more], ttl_s)

    def unpin(self, draw: Draw, pinned: Pinned) -> None:
        self.world.unpin(pinned)

    def follow(self, draw: Draw) -> None:
        """The slow watcher takes some messages, or its stream breaks."""
        num_messages = draw(FOLLOWS)
        for _ in range(num_messages):
            self.world.slow.step()
        if not num_messages:
            self.world.break_stream()

    def pass_time(self, draw: Draw) -> None:
        """The store notices at once or with the next operation."""
        seconds, is_noticed = draw(TIMES)
        self.world.now += seconds
        if is_noticed:
            self.world.life.index.expire()

    def take_away(self, draw: Draw) -> None:
        """Blocks go; a reader may report any as corrupt."""
        how, keys = draw(LOSSES)
        index = self.world.life.index
        if how == "evict":
            index.evict(len(keys))
        elif how == "discard":
            self.world.discard(keys)
        else:
            self.world.drop_corrupt(keys)

    def have_trouble(self, draw: Draw) -> None:
        """An owner begins another life, known or not; a sealed bit turns; the store restarts."""
        what, who = draw(TROUBLES)
        if what == "restart":
            self.world.begin()
        elif what == "flip":
            for write in self._sealed()[-1:]:
                self.world.flip(write)
        else:
            self.world.end_owner(self._owner(who), is_known=what == "crash")
            self.incarnations[who] += 1

    @invariant()
    def promises_are_kept(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.quiesce()
        if self.reached is not None:
            self.reached.update(self.world.reached)

    def _owner(self, who: str) -> str:
        return f"{who}.{self.incarnations[who]}"

    def _on_the_way(self) -> list[Write]:
        return [
            write
            for write in self.world.writes
            if not write.is_over
            and write.state is not State.SEALED
            and write.num_landed < NUM_PARTS
        ]

    def _remembered(self) -> list[Write]:
        """Writes whose owner lives and has not given them back."""
        living = set(map(self._owner, WRITERS))
        return [w for w in self.world.writes if w.owner in living and not w.is_over]

    def _sealed(self) -> list[Write]:
        return [write for write in self.world.life.granted if write.state is State.SEALED]


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=NUM_STEPS, deadline=None)


def run_machine(
    habits: Habits, num_examples: int, base: type[StoreMachine] = StoreMachine
) -> Counter[str]:
    """Runs the same examples each time; returns what they reached."""
    reached: Counter[str] = Counter()
    machine = type("Mutant", (base,), {"habits": habits, "reached": reached})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=NUM_STEPS,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            report_multiple_bugs=False,
        ),
    )
    return reached


@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_finds(name: str) -> None:
    habits, complaint = MUTANTS[name]
    with pytest.raises(AssertionError, match=complaint):
        run_machine(habits, num_examples=200)


def test_the_machine_reaches_what_it_is_about() -> None:
    assert set(run_machine(Habits(pins=True), num_examples=60)) >= {
        "used",
        "HELD",
        "EXPIRED",
        "found corrupt",
        "hit another's block",
        "landed in an old life",
        "landed in quarantine",
        "not sealed",
        "reused a slot",
        "pinned",
        "unpinned",
        "a pin expired",
        "dropped a pinned block",
        "fell behind in a snapshot",
        "followed",
    }
