"""Short ways to write the panels that the boards have in common."""

from __future__ import annotations

from dashboards.board import Look, Panel, Query
from dashboards.promql import Expression, quantile


def query(expression: Expression, legend: str = "", *, needs_gpu: bool = False) -> Query:
    """A query; `legend` names its series, {{label}} stands for a label's value."""
    return Query(expression=expression, legend=legend, needs_gpu=needs_gpu)


def quantiles(key: str) -> tuple[Query, ...]:
    """p50, p95 and p99 of a histogram."""
    return tuple(query(quantile(q, key), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99))


def number(title: str, text: str, expression: Expression, legend: str = "") -> Panel:
    """Last values in large print."""
    return Panel(
        title=title, text=text, look=Look.NUMBER, queries=(query(expression, legend),), width=4
    )


def panel(title: str, text: str, look: Look, *queries: Query, width: int = 8) -> Panel:
    """Any other panel."""
    return Panel(title=title, text=text, look=look, queries=queries, width=width)
