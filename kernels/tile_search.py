"""The search for the fastest tiles of one operation at one shape.

Owns what makes a configuration acceptable (right, and bit for bit the same rows whatever the number
of rows) and how one order of summation is chosen for all row counts. Never knows an operation, a
clock or a file: they are passed in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kernels.tile_format import TUNED, Entry, Values
from kernels.timing import require_close

# A configuration this much slower than its order's fastest, seen once, is not worth a second look.
_CLOSE = 1.05
_NUM_FINALISTS = 3

Order = tuple[int, ...]
"""The values of a Tunable's `order`, in its order."""

Timer = Callable[[Sequence[Callable[[], object]]], float]
"""Seconds of one of the calls: kernels.timing.time_graph."""

Begin = Callable[[int, Values], bool]
"""Hears of every attempt (number of rows, tiles) before it is made; False forbids it."""


class Tunable(Protocol):
    """One operation at one shape, on random data of its own.

    op, key: its place in a table; order: names of the tile values that fix the order of summation;
    limit: the largest relative error against `reference`.
    """

    op: str
    key: str
    order: tuple[str, ...]
    limit: float

    def candidates(self, num_rows: int) -> Sequence[Values]:
        """Configurations worth timing, the operation's own choice first."""
        ...

    def inputs(self, num_rows: int, *, cold: bool) -> Sequence[Any]:
        """Sets of inputs, enough to stay L2-cold, or one. The first set for fewer rows is the
        beginning of the first set for more.
        """
        ...

    def run(self, tiles: Values, inputs: Any) -> Any:
        """What the operation returns for one set."""
        ...

    def timed(self, tiles: Values, inputs: Any) -> None:
        """`run`, and whatever a configuration leaves for the next kernel to do."""
        ...

    def result(self, out: Any) -> torch.Tensor:
        """The finished values of what `run` returned, rows first."""
        ...

    def written(self, out: Any) -> Sequence[torch.Tensor]:
        """Every tensor that `run` filled."""
        ...

    def reference(self, inputs: Any) -> torch.Tensor:
        """`result` in higher precision."""
        ...


@dataclass(slots=True, kw_only=True)
class Search:
    """Searches one Tunable; `report` gets a line for every configuration, timed or refused."""

    tunable: Tunable
    timer: Timer
    report: Callable[[str], None]
    begin: Begin = lambda _num_rows, _tiles: True
    num_refused: int = 0
    # By order of summation: the first accepted result, which has the most rows.
    _canonical: dict[Order, torch.Tensor] = field(default_factory=dict)

    def run(self, row_counts: Sequence[int], about: Mapping[str, object]) -> Entry | None:
        """The best tiles for every row count; None if no order was acceptable for all of them."""
        found = {n: self._best(n) for n in sorted(set(row_counts), reverse=True)}
        seconds = {n: {order: best[0] for order, best in found[n].items()} for n in found}
        order = best_order(seconds)
        if order is None:
            return None
        names = self.tunable.order
        rows = tuple(
            (n, {name: value for name, value in found[n][order][1].items() if name not in names})
            for n in sorted(found)
        )
        us = {str(n): round(found[n][order][0] * 1e6, 2) for n in sorted(found)}
        return Entry(
            source=TUNED,
            order=dict(zip(names, order, strict=True)),
            rows=rows,
            about={**about, "us": us},
        )

    def check(self, row_counts: Sequence[int], part: int = 0, num_parts: int = 1) -> None:
        """Compiles and checks every num_parts-th configuration from `part` on; times nothing."""
        for num_rows in sorted(set(row_counts), reverse=True):
            inputs = self.tunable.inputs(num_rows, cold=False)[0]
            reference = self.tunable.reference(inputs)
            for tiles in self.tunable.candidates(num_rows)[part::num_parts]:
                self._accepts(num_rows, tiles, inputs, reference)

    def _best(self, num_rows: int) -> dict[Order, tuple[float, Values]]:
        """Seconds and tiles of the fastest acceptable configuration of every order."""
        tunable = self.tunable
        timed: dict[Order, list[tuple[float, Values]]] = {}
        sets = tunable.inputs(num_rows, cold=True)
        reference = tunable.reference(sets[0])
        for tiles in tunable.candidates(num_rows):
            if not self._accepts(num_rows, tiles, sets[0], reference):
                continue
            seconds = self._seconds(num_rows, tiles, sets)
            self._say(num_rows, tiles, f"{seconds * 1e6:.2f} us")
            timed.setdefault(self._order(tiles), []).append((seconds, tiles))
        return {order: self._final(num_rows, found, sets) for order, found in timed.items()}

    def _final(
        self, num_rows: int, timed: list[tuple[float, Values]], sets: Sequence[Any]
    ) -> tuple[float, Values]:
        """The winner after the close ones were timed again, there and back.

        The clock of a GPU sinks while it works: those timed late would lose to those timed early.
        """
        timed.sort(key=lambda one: one[0])
        close = [t for seconds, t in timed[:_NUM_FINALISTS] if seconds <= _CLOSE * timed[0][0]]
        if len(close) == 1:
            return timed[0]
        there = [self._seconds(num_rows, tiles, sets) for tiles in close]
        back = [self._seconds(num_rows, tiles, sets) for tiles in reversed(close)][::-1]
        means = [statistics.fmean(pair) for pair in zip(there, back, strict=True)]
        return min(zip(means, close, strict=True), key=lambda one: one[0])

    def _seconds(self, num_rows: int, tiles: Values, sets: Sequence[Any]) -> float:
        self.begin(num_rows, tiles)
        return self.timer([lambda one=one: self.tunable.timed(tiles, one) for one in sets])

    def _accepts(self, num_rows: int, tiles: Values, inputs: Any, reference: torch.Tensor) -> bool:
        """Whether it runs, is right, fills every value, and has the bits of its order."""
        tunable = self.tunable
        if not self.begin(num_rows, tiles):
            self.num_refused += 1
            self._say(num_rows, tiles, "refused: it never came back")
            return False
        try:
            for tensor in tunable.written(tunable.run(tiles, inputs)):
                tensor.fill_(math.nan)  # the allocator gives the same memory to the next run
            result = tunable.result(tunable.run(tiles, inputs))
            require_close("result", result, reference, tunable.limit)
            canonical = self._canonical.setdefault(self._order(tiles), result.clone())
            if not torch.equal(result, canonical[:num_rows]):
                raise ValueError("a row's bits are not those of another configuration")
        except Exception as error:  # whatever compiler, driver or gate say: not this one
            self.num_refused += 1
            words = str(error).strip().splitlines() or [type(error).__name__]
            self._say(num_rows, tiles, f"refused: {words[0][:120]}")
            return False
        return True

    def _order(self, tiles: Values) -> Order:
        return tuple(tiles[name] for name in self.tunable.order)

    def _say(self, num_rows: int, tiles: Values, words: str) -> None:
        text = " ".join(f"{name}={value}" for name, value in tiles.items())
        self.report(f"{self.tunable.op}/{self.tunable.key} rows {num_rows}: {text}: {words}")


def best_order(seconds: Mapping[int, Mapping[Order, float]]) -> Order | None:
    """The order that loses least against the best of each row count, in the geometric mean.

    seconds: by row count and order. Only orders that every row count has come into question.
    """
    common = set.intersection(*(set(orders) for orders in seconds.values())) if seconds else set()
    if not common:
        return None
    fastest = {num_rows: min(orders.values()) for num_rows, orders in seconds.items()}

    def loss(order: Order) -> float:
        return sum(math.log(seconds[n][order] / fastest[n]) for n in seconds)

    return min(sorted(common), key=loss)
