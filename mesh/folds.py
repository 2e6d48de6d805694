"""Histograms of what happens every step, as plain sums that are exported whole.

Owns the sums and their series. A value costs a bisection and two additions; the SDK's own
histograms take about ten times that for each value and reader.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping

from mesh.instruments import STEPS


class Fold:
    """One series of a histogram: `counts[i]` values up to bounds[i], the last one all above.

    One thread records; others may read meanwhile.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def record(self, value: float) -> None:
        """Adds one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


class Folds:
    """The series of one process, by key of `mesh.instruments.STEPS` and attributes."""

    def __init__(self) -> None:
        self._series: dict[str, list[tuple[Mapping[str, str], Fold]]] = {}

    def series(self, key: str, **attributes: str) -> Fold:
        """A new series, there with no values from the start; attributes as the table has them."""
        fold = Fold(STEPS[key].buckets)
        self._series.setdefault(key, []).append((attributes, fold))
        return fold

    def __iter__(self) -> Iterator[tuple[str, list[tuple[Mapping[str, str], Fold]]]]:
        return iter(list(self._series.items()))
