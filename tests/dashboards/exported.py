"""Names of metrics as Prometheus knows them, found in queries and derived from the table."""

from __future__ import annotations

import re

from dashboards.promql import exported_name
from mesh.instruments import ALL
from mesh.metric import Kind

OTHERS = {"target_info", "up"}
"""Of OpenTelemetry's exporter and of Prometheus itself."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NAME = re.compile(r"\b(?:kvmesh|gen_ai)_\w+|\btarget_info\b|\bup\b")


def declared_names() -> set[str]:
    """Every series that the table's metrics give."""
    names: set[str] = set()
    for metric in ALL.values():
        is_histogram = metric.kind is Kind.HISTOGRAM
        suffixes = ("_bucket", "_sum", "_count") if is_histogram else ("",)
        names |= {exported_name(metric) + suffix for suffix in suffixes}
    return names


def used_names(query: str) -> set[str]:
    """The series that a query reads."""
    return set(_NAME.findall(_STRING.sub("", query)))
