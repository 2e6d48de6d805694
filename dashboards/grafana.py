"""Boards as Grafana's JSON, written with Grafana's own Foundation SDK (of Grafana 11.6).

Owns every word about Grafana; knows nothing about metrics.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as values
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.board import Board, Choice, Look, Panel, Query
from dashboards.promql import SERVICES, exported_name
from mesh.instruments import ALL

TAG = "kvmesh"
SOURCE = values.DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT, NUMBER_HEIGHT = 8, 4
PER_TABLE_ROW = "instance"
_ROLE = "service_name"


def to_json(board: Board) -> str:
    """The board as the text of a file that Grafana's provisioning reads."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.text)
        .tags([TAG])
        .timezone("browser")
        .tooltip(values.DashboardCursorSync.CROSSHAIR)
        .refresh("5s")
        .time("now-15m", "now")
        .link(_to_the_others())
        .variables([_datasource(), _instances(), *map(_choice, board.choices)])
    )
    number = 0
    for row in board.rows:
        made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            number += 1
            made.with_panel(_panel(panel).id(number))
    return JSONEncoder(indent=2, sort_keys=True).encode(made.build()) + "\n"


def _panel(panel: Panel) -> Any:
    """A panel's builder. SDK builders share methods but no type, hence Any."""
    make: dict[Look, Callable[[Panel], Any]] = {
        Look.LINES: lambda _: _lines().fill_opacity(8),
        Look.STACKED: lambda _: _stacked(options.StackingMode.NORMAL),
        Look.SHARES: lambda _: _stacked(options.StackingMode.PERCENT),
        Look.HEATMAP: _heatmap,
        Look.NUMBER: lambda _: _number(),
        Look.BARS: lambda _: _bars(),
        Look.TABLE: _table,
    }
    builder = make[panel.look](panel)
    if panel.look is not Look.TABLE:
        builder.unit(panel.unit)
    for ref, query in zip(string.ascii_uppercase, panel.queries, strict=False):
        builder.with_target(_target(ref, query, panel.look))
    return (
        builder.title(panel.title)
        .description(panel.text)
        .datasource(SOURCE)
        .span(panel.width)
        .height(NUMBER_HEIGHT if panel.look is Look.NUMBER else HEIGHT)
    )


def _target(ref: str, query: Query, look: Look) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(ref).datasource(SOURCE).expr(query.expression.text)
    if look is Look.TABLE:
        return target.instant().format(PromQueryFormat.TABLE)
    if look is Look.HEATMAP:
        target.format(PromQueryFormat.HEATMAP)
    return target.range().legend_format(query.legend or "__auto")


def _lines() -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(options.LegendDisplayMode.LIST)
    tooltip = (
        common.VizTooltipOptions()
        .mode(options.TooltipDisplayMode.MULTI)
        .sort(options.SortOrder.DESCENDING)
    )
    return (
        timeseries.Panel()
        .legend(legend.placement(options.LegendPlacement.BOTTOM).show_legend(True))
        .tooltip(tooltip.sort(options.SortOrder.DESCENDING))
        .show_points(options.VisibilityMode.NEVER)
        .line_width(1)
        .min(0)
    )


def _stacked(mode: options.StackingMode) -> timeseries.Panel:
    return _lines().fill_opacity(50).stacking(common.StackingConfig().mode(mode))


def _heatmap(panel: Panel) -> heatmap.Panel:
    colours = heatmap.HeatmapColorOptions().scheme("Turbo").steps(64)
    return (
        heatmap.Panel()
        .calculate(False)
        .color(colours)
        .y_axis(heatmap.YAxisConfig().unit(panel.unit))
        .show_legend()
    )


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"])


def _number() -> stat.Panel:
    return (
        stat.Panel()
        .reduce_options(_last())
        .graph_mode(options.BigValueGraphMode.AREA)
        .color_mode(options.BigValueColorMode.NONE)
    )


def _bars() -> bargauge.Panel:
    return (
        bargauge.Panel()
        .reduce_options(_last())
        .orientation(options.VizOrientation.HORIZONTAL)
        .display_mode(options.BarGaugeDisplayMode.BASIC)
        .min(0)
    )


def _table(panel: Panel) -> table.Panel:
    """A row an instance: each query's frame has the column "Value #" and its letter."""
    made = table.Panel()
    names = {PER_TABLE_ROW: "Instance", _ROLE: "Role"}
    for ref, query in zip(string.ascii_uppercase, panel.queries, strict=False):
        if query.expression != SERVICES:
            names[f"Value #{ref}"] = query.legend
            unit = values.DynamicConfigValue(id_val="unit", value=query.expression.unit)
            made.override_by_name(query.legend, [unit])
    steps = {
        "joinByField": {"byField": PER_TABLE_ROW, "mode": "outer"},
        "filterFieldsByName": {"include": {"names": list(names)}},
        "organize": {
            "renameByName": names,
            "indexByName": {name: place for place, name in enumerate(names)},
        },
    }
    for name, how in steps.items():
        made.with_transformation(values.DataTransformerConfig(id_val=name, options=how))
    return made


def _to_the_others() -> dashboard.DashboardLink:
    """A menu of the other boards that keeps the time range."""
    link = dashboard.DashboardLink("kvmesh").type(values.DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.as_dropdown(True).keep_time(True)


def _datasource() -> dashboard.DatasourceVariable:
    current = values.VariableOption(selected=True, text="prometheus", value="prometheus")
    return (
        dashboard.DatasourceVariable("datasource")
        .label("Data source")
        .type("prometheus")
        .current(current)
    )


def _instances() -> dashboard.QueryVariable:
    """Every process exports how much telemetry it lost, hence all of them are found by that."""
    everyone = values.VariableOption(selected=True, text=["All"], value=["$__all"])
    return (
        dashboard.QueryVariable("instance")
        .label("Instance")
        .datasource(SOURCE)
        .query(f"label_values({exported_name(ALL['telemetry_dropped'])}, instance)")
        .refresh(values.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(values.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everyone)
    )


def _choice(choice: Choice) -> dashboard.CustomVariable:
    listed = [
        values.VariableOption(selected=option == choice.default, text=option[0], value=option[1])
        for option in choice.options
    ]
    default = listed[choice.options.index(choice.default)]
    return (
        dashboard.CustomVariable(choice.name)
        .label(choice.label)
        .values(", ".join(f"{text} : {value}" for text, value in choice.options))
        .options(listed)
        .current(default)
    )
