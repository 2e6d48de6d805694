"""The tuner's search takes only what is right, and one order of summation for all row counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kernels.tile_format import Values
from kernels.tile_search import Search, best_order

WIDTH = 8


@dataclass
class Doubling:
    """Doubles its rows; tiles say how wrong a configuration is and how long it takes."""

    tiles: Sequence[Values]
    op: str = "double"
    key: str = "8"
    order: tuple[str, ...] = ("num_splits",)
    limit: float = 1e-3
    rows: torch.Tensor = field(default_factory=lambda: torch.randn(64, WIDTH))
    calls: list[tuple[Values, int]] = field(default_factory=list)

    def candidates(self, num_rows: int) -> Sequence[Values]:
        return [tiles for tiles in self.tiles if tiles.get("most_rows", 64) >= num_rows]

    def inputs(self, num_rows: int, *, cold: bool) -> Sequence[torch.Tensor]:
        return [self.rows[:num_rows], self.rows[:num_rows] + 1][: 1 + cold]

    def run(self, tiles: Values, inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append((tiles, inputs.shape[0]))
        if tiles.get("crashes"):
            raise RuntimeError("out of resource: shared memory")
        out = inputs * 2 * (1 + tiles.get("wrong_by", 0))
        out = out * (1 + 1e-5 * tiles["num_splits"])
        if tiles.get("looks_at_rows"):
            out = out * (1 + 1e-6 * inputs.shape[0])
        if tiles.get("forgets_a_value"):
            out[0, 0] = torch.nan
        return out

    def timed(self, tiles: Values, inputs: torch.Tensor) -> None:
        self.run(tiles, inputs)

    def result(self, out: Any) -> torch.Tensor:
        return out

    def written(self, out: Any) -> Sequence[torch.Tensor]:
        return [out]

    def reference(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.double() * 2


def search(tunable: Doubling, seconds: Callable[[Values, int], float]) -> Search:
    """A Search whose clock looks the time up by the tiles and rows of the call."""

    def timer(calls: Sequence[Callable[[], object]]) -> float:
        calls[0]()
        return seconds(*tunable.calls[-1])

    return Search(tunable=tunable, timer=timer, report=lambda line: None)


def test_the_fastest_configuration_wins() -> None:
    tiles = [{"num_splits": 1, "block_m": block} for block in (16, 32, 64)]
    entry = search(Doubling(tiles), lambda t, n: abs(t["block_m"] - 32) + 1.0).run([16], {})
    assert entry is not None
    assert entry.order == {"num_splits": 1}
    assert entry.rows == ((16, {"block_m": 32}),)


def test_close_ones_are_timed_again_there_and_back() -> None:
    """The clock sinks: every look takes 1 % longer, the truly faster one came second."""
    tiles = [{"num_splits": 1, "block_m": block} for block in (16, 32, 64)]
    true = {16: 1.0, 32: 0.995, 64: 3.0}
    looks: list[int] = []

    def seconds(values: Values, num_rows: int) -> float:
        looks.append(values["block_m"])
        return true[values["block_m"]] * 1.01 ** len(looks)

    entry = search(Doubling(tiles), seconds).run([16], {})
    assert looks == [16, 32, 64, 16, 32, 32, 16]
    assert entry is not None
    assert entry.rows == ((16, {"block_m": 32}),)


def test_one_order_holds_for_all_row_counts() -> None:
    """4 splits win at one row, 1 at 64 and by more: 1 it is, with its best tiles for each."""
    tiles = [{"num_splits": s, "block_m": b} for s in (1, 4) for b in (16, 64)]

    def seconds(values: Values, num_rows: int) -> float:
        split = {1: {1: 2.0, 4: 1.0}, 64: {1: 1.0, 4: 4.0}}[num_rows][values["num_splits"]]
        return split * (1.0 if (values["block_m"] == 64) == (num_rows == 64) else 1.5)

    entry = search(Doubling(tiles), seconds).run([1, 64], {"gpu": "G"})
    assert entry is not None
    assert entry.order == {"num_splits": 1}
    assert entry.rows == ((1, {"block_m": 16}), (64, {"block_m": 64}))
    assert entry.about == {"gpu": "G", "us": {"1": 2e6, "64": 1e6}}


@pytest.mark.parametrize("flaw", ["crashes", "wrong_by", "looks_at_rows", "forgets_a_value"])
def test_a_flawed_configuration_is_refused_however_fast(flaw: str) -> None:
    tiles = [{"num_splits": 1}, {"num_splits": 1, flaw: 1}]
    lines: list[str] = []
    run = search(Doubling(tiles), lambda t, n: 0.1 if flaw in t else 1.0)
    run.report = lines.append
    entry = run.run([1, 16], {})
    assert entry is not None
    assert entry.rows == ((1, {}), (16, {}))
    assert run.num_refused == 2
    assert sum("refused" in line and flaw in line for line in lines) == 2


def test_nothing_acceptable_gives_no_entry() -> None:
    assert (
        search(Doubling([{"num_splits": 1, "crashes": 1}]), lambda t, n: 1.0).run([1], {}) is None
    )


def test_an_order_that_a_row_count_lacks_is_no_choice() -> None:
    tiles = [{"num_splits": 1}, {"num_splits": 4, "most_rows": 16}]
    entry = search(Doubling(tiles), lambda t, n: 1.0 / t["num_splits"]).run([1, 64], {})
    assert entry is not None
    assert entry.order == {"num_splits": 1}


def test_checks_in_parts_cover_every_configuration() -> None:
    tiles = [{"num_splits": 1, "block_m": 2**power} for power in range(5)]
    tunable = Doubling(tiles)
    for part in range(2):
        before = len(tunable.calls)
        run = search(tunable, lambda t, n: 1.0)
        run.check([1], part, 2)
        assert not run.num_refused
        assert len(tunable.calls) - before < 2 * len(tiles)
    assert {t["block_m"] for t, _ in tunable.calls} == {t["block_m"] for t in tiles}


def test_without_a_common_order_there_is_none() -> None:
    assert best_order({}) is None
    assert best_order({1: {(1,): 1.0}, 2: {(2,): 1.0}}) is None
