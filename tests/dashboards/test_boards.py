"""The boards' files: made by their code, well formed, over declared metrics, with right units."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from dashboards.board import Board, Look, Panel, Query
from dashboards.build import BOARDS, FOLDER
from dashboards.grafana import to_json
from dashboards.promql import exported_name, level, rate
from mesh.instruments import ALL
from tests.dashboards.exported import OTHERS, declared_names, used_names

GRAFANAS = {"datasource", "__rate_interval"}
WIDTH = 24


@pytest.fixture(params=BOARDS, ids=lambda board: board.uid)
def board(request: pytest.FixtureRequest) -> Board:
    return request.param


@pytest.fixture
def made(board: Board) -> dict[str, Any]:
    return json.loads((FOLDER / f"{board.uid}.json").read_text())


def expressions(made: dict[str, Any]) -> list[str]:
    return [t["expr"] for panel in made["panels"] for t in panel.get("targets", [])]


def test_a_file_is_what_its_code_makes(board: Board) -> None:
    """`make dashboards` after a change."""
    assert (FOLDER / f"{board.uid}.json").read_text() == to_json(board)


def test_no_other_board_lies_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {board.uid for board in BOARDS}


def test_grafana_11_reads_it(board: Board, made: dict[str, Any]) -> None:
    assert made["uid"] == board.uid and made["title"] and made["schemaVersion"] in range(39, 42)
    panels = [panel for panel in made["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len(board.panels)
    for panel in panels:
        assert panel["title"] and panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)


def test_panels_fill_rows_and_never_overlap(made: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    height = max(y for _, y in taken) + 1
    assert taken == {(x, y) for x in range(WIDTH) for y in range(height)}


def test_variables_are_declared(made: dict[str, Any]) -> None:
    declared = {variable["name"] for variable in made["templating"]["list"]}
    used = {name for text in expressions(made) for name in re.findall(r"\$(\w+)", text)}
    assert used <= declared | GRAFANAS
    assert declared - GRAFANAS <= used, "a choice that changes nothing"


def test_metrics_are_declared(made: dict[str, Any]) -> None:
    for text in expressions(made):
        names = used_names(text)
        assert names and names <= declared_names() | OTHERS, text


def test_every_metric_is_on_a_board() -> None:
    used = {
        name
        for board in BOARDS
        for panel in board.panels
        for query in panel.queries
        for name in used_names(query.expression.text)
    }
    unseen = [m.name for m in ALL.values() if not [n for n in used if exported_name(m) in n]]
    assert not unseen


# What a query does to a metric, and Grafana's unit of what comes out; the first that fits.
UNITS = (
    (r"^histogram_quantile\(.*_seconds_bucket", "s"),
    (r"^histogram_quantile\(.*_tokens_bucket", "short"),
    (r"^sum by \(le\) \(rate\(\w+_seconds_bucket", "s"),
    (r"^sum by \(le\) \(rate\(\w+_tokens_bucket", "short"),
    (r"_bytes_total.* / .*_seconds_sum", "Bps"),
    (r"_seconds_bucket.* / .*_seconds_count", "percentunit"),
    (r"_seconds_sum.* / (max\()?sum.*_seconds_count", "s"),
    (r"step_tokens_sum.* / .*step_tokens_count", "short"),
    (r" / ", "percentunit"),
    (r"rate\(\w+_bytes_total", "Bps"),
    (r"rate\(kvmesh_(\w+_)?tokens_total", "suffix: tokens/s"),
    (r"rate\(kvmesh_requests_total", "suffix: requests/s"),
    (r"rate\(kvmesh_kv_(lookup_blocks|evictions|tier_blocks)_total", "suffix: blocks/s"),
    (r"rate\(kvmesh_kv_prefetches_total", "suffix: pulls/s"),
    (r"rate\(kvmesh_decode_step_duration_seconds_count", "suffix: steps/s"),
    (r"rate\(kvmesh_kv_transfer_duration_seconds_count", "suffix: transfers/s"),
    (r"kvmesh_gpu_utilization", "percentunit"),
    (r"kvmesh_gpu_memory_bytes", "bytes"),
    (r"^sum.*(increase\(|kvmesh_(sequences|peer_state|kv_blocks|kv_verify)|target_info)", "short"),
)


def units_of(panel: dict[str, Any]) -> list[str]:
    """A unit for each of the panel's queries."""
    if panel["type"] != "table":
        unit = panel["fieldConfig"]["defaults"]["unit"]
        if panel["type"] == "heatmap":
            assert panel["options"]["yAxis"]["unit"] == unit
        return [unit] * len(panel["targets"])
    shown = {
        override["matcher"]["options"]: override["properties"][0]["value"]
        for override in panel["fieldConfig"]["overrides"]
    }
    names = next(t["options"] for t in panel["transformations"] if t["id"] == "organize")
    columns = (names["renameByName"].get(f"Value #{t['refId']}") for t in panel["targets"])
    return [shown[column] if column else "short" for column in columns]


def test_units_are_right(made: dict[str, Any]) -> None:
    for panel in made["panels"]:
        if panel["type"] == "row":
            continue
        for target, unit in zip(panel["targets"], units_of(panel), strict=True):
            text = target["expr"]
            expected = next((unit for what, unit in UNITS if re.search(what, text)), None)
            assert unit == expected, f"{panel['title']}: {text}"


def test_what_is_not_declared_cannot_be_asked() -> None:
    with pytest.raises(KeyError, match="decode_words"):
        rate("decode_words")
    with pytest.raises(ValueError, match="kvmesh.decode.tokens has no disposition \\['eaten'\\]"):
        rate("decode_tokens", disposition="eaten")
    with pytest.raises(ValueError, match="kvmesh.decode.tokens has no attribute 'colour'"):
        rate("decode_tokens", by="colour")


def test_a_panel_has_one_unit() -> None:
    queries = tuple(
        Query(expression=expression, legend="")
        for expression in (rate("decode_tokens"), level("sequences"))
    )
    with pytest.raises(ValueError, match="panel 'Both' has units"):
        Panel(title="Both", text="", look=Look.LINES, queries=queries)
