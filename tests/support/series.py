"""What processes of a mesh export on their Prometheus ports, series by series, and what moved.

Owns the values seen so far. A series is a metric's key in `mesh.instruments` and its attributes.
"""

from __future__ import annotations

import itertools
import re
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from dashboards.promql import exported_name
from mesh.instruments import ALL, ERROR_REASON
from mesh.metric import Kind
from tests.support.mesh import Process

Series = tuple[str, frozenset[tuple[str, str]]]
_PORT = re.compile(r"metrics at (http://[\w.:]+/metrics)")
_OWN_LABELS = ("le", "otel_scope_name", "otel_scope_version", "otel_scope_schema_url")
_KEYS = {
    exported_name(metric) + ("_count" if metric.kind is Kind.HISTOGRAM else ""): key
    for key, metric in ALL.items()
}


def declared() -> set[Series]:
    """Every series of the table; of reasons that are no closed set, one that stands for any."""
    return {
        (key, frozenset(zip(metric.attributes, values, strict=True)))
        for key, metric in ALL.items()
        for values in itertools.product(*metric.attributes.values())
    }


class Scrapes:
    """Scrapes, and remembers which series had a value above 0, or another one than before."""

    def __init__(self) -> None:
        self.lines: dict[str, None] = {}  # each different one once
        self.moved: set[Series] = set()
        self._values: dict[tuple[str, Series], float] = {}

    def scrape(self, process: Process) -> dict[Series, float]:
        """The values of one process now."""
        urls = [match.group(1) for line in process.lines if (match := _PORT.search(line))]
        with urllib.request.urlopen(urls[-1], timeout=20) as answer:
            text = answer.read().decode()
        self.lines |= dict.fromkeys(text.splitlines())
        values: dict[Series, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if key := _KEYS.get(sample.name):
                    series = (key, frozenset(_attributes(key, sample.labels)))
                    values[series] = values.get(series, 0.0) + sample.value
        for series, value in values.items():
            if value != self._values.setdefault((urls[-1], series), 0.0):
                self.moved.add(series)
                self._values[urls[-1], series] = value
        return values


def _attributes(key: str, labels: dict[str, str]) -> list[tuple[str, str]]:
    """Of a sample; reasons that are no closed set are all one."""
    closed = ALL[key].attributes
    return [
        (name, ERROR_REASON[0] if closed[name] == ERROR_REASON else value)
        for name, value in labels.items()
        if name in closed and name not in _OWN_LABELS
    ]
