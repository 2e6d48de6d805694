"""What a board is made of, without a word about Grafana: rows of panels, each with its queries.

Owns the shapes; `grafana` turns them into JSON, `promql` writes the queries.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dashboards.promql import Expression


class Look(enum.Enum):
    """How a panel shows its queries."""

    LINES = "lines over time"
    STACKED = "areas over time, one upon the other"
    SHARES = "areas over time, scaled to 100 %"
    HEATMAP = "one histogram over time"
    NUMBER = "the last value of each query, large"
    BARS = "a bar for the last value of each query"
    TABLE = "a row an instance, a column a query"


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query of a panel. `needs_gpu`: a mesh without a GPU has no data for it."""

    expression: Expression
    legend: str
    needs_gpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel; `width` in 24ths of the board. Its queries share a unit unless it is a table."""

    title: str
    text: str
    look: Look
    queries: tuple[Query, ...]
    width: int = 8

    def __post_init__(self) -> None:
        """ValueError: two units on one axis."""
        units = {query.expression.unit for query in self.queries}
        if self.look is not Look.TABLE and len(units) != 1:
            raise ValueError(f"panel {self.title!r} has units {sorted(units)}, must have one")

    @property
    def unit(self) -> str:
        """Grafana's id of the queries' unit."""
        return self.queries[0].expression.unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Panels under one heading, left to right."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A value that the reader picks; `options` are what is shown and what `$name` stands for."""

    name: str
    label: str
    options: tuple[tuple[str, str], ...]
    default: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard; `uid` is also the name of its file."""

    uid: str
    title: str
    text: str
    rows: tuple[Row, ...]
    choices: tuple[Choice, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Every panel, in reading order."""
        return tuple(panel for row in self.rows for panel in row.panels)
