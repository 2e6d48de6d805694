"""Every query of every board and rule against a Prometheus that scraped a mesh under load."""

from __future__ import annotations

import math
import statistics

import pytest

from dashboards import overview, promql
from dashboards.board import Board, Query
from dashboards.build import BOARDS
from dashboards.promql import WINDOW
from tests.support.prometheus import Prometheus

CASES = [
    pytest.param(board, query, id=f"{board.uid}-{panel.title}-{query.legend}")
    for board in BOARDS
    for panel in board.panels
    for query in panel.queries
    if not query.needs_gpu
]


def filled_in(board: Board, query: Query) -> str:
    """A query's text with what Grafana puts for the variables."""
    values = {choice.name: choice.default[1] for choice in board.choices}
    values |= {"instance": ".*", WINDOW.removeprefix("$"): "10s"}
    text = query.expression.text
    for name, value in values.items():
        text = text.replace(f"${name}", value)
    assert "$" not in text
    return text


@pytest.mark.timeout(400)  # the first one waits for the whole load
@pytest.mark.parametrize(("board", "query"), CASES)
def test_a_query_returns_data(prometheus: Prometheus, board: Board, query: Query) -> None:
    text = filled_in(board, query)
    assert any(map(math.isfinite, prometheus.points(text))), text


@pytest.mark.timeout(400)
def test_shares_lie_between_none_and_all(prometheus: Prometheus) -> None:
    for board in BOARDS:
        for panel in board.panels:
            if panel.unit != "percentunit":
                continue
            for query in panel.queries:
                values = prometheus.points(filled_in(board, query))
                assert all(0 <= v <= 1 + 1e-9 for v in values if math.isfinite(v)), query


@pytest.mark.timeout(400)
def test_phases_add_up_to_the_time_to_first_token(prometheus: Prometheus) -> None:
    """The waterfall's bars and the mean beside it are one figure.

    A scrape may come between two of a request's records: few points show that, the median none.
    """
    phases = overview.BOARD.rows[1].panels[0].queries
    parts = " + ".join(f"({filled_in(overview.BOARD, query)})" for query in phases)
    mean = Query(expression=promql.mean(overview.FIRST), legend="")
    both = f"({parts}) / ({filled_in(overview.BOARD, mean)})"
    ratios = [ratio for ratio in prometheus.points(both) if math.isfinite(ratio)]
    assert statistics.median(ratios) == pytest.approx(1.0, rel=0.01)


@pytest.mark.timeout(400)
def test_rules_are_evaluated(prometheus: Prometheus) -> None:
    """And one of them saw the rank that was killed."""

    def all_is_told() -> bool:
        groups = prometheus.get("rules")["groups"]
        rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
        assert not [rule for rule in rules.values() if rule["health"] == "err"]
        down = (rules["KvmeshProcessDown"], rules["KvmeshInstanceNotReady"])
        is_evaluated = all(rule["health"] == "ok" for rule in rules.values())
        return is_evaluated and all(rule["state"] != "inactive" for rule in down)

    prometheus.wait_until(all_is_told, "the rules see a rank that is down")


@pytest.mark.timeout(400)
def test_a_block_spoiled_on_disk_is_an_alert(prometheus: Prometheus) -> None:
    assert prometheus.points('ALERTS{alertname="KvmeshBlockCorrupt", alertstate="firing"}')


@pytest.mark.timeout(400)
def test_instances_are_found(prometheus: Prometheus) -> None:
    """By the query that fills the boards' choice of instances."""
    found = prometheus.get("label/instance/values", **{"match[]": "kvmesh_telemetry_dropped_total"})
    assert len(found) == 5
