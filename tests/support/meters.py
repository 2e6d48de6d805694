"""A process's telemetry that keeps its metrics here, for tests of what is recorded."""

from __future__ import annotations

from collections import Counter

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from mesh.folded_readers import folded
from mesh.folds import Folds
from mesh.telemetry import Telemetry


class Meters:
    """`telemetry` records; `totals` and `observed` tell what."""

    def __init__(self) -> None:
        folds = Folds()
        self._reader: InMemoryMetricReader = folded(InMemoryMetricReader, folds)()
        meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.telemetry = Telemetry(None, meters.get_meter("test"), folds)

    def totals(self, name: str) -> Counter[tuple[str, ...]]:
        """Of a metric, by the values of its attributes; of a histogram its sums."""
        totals: Counter[tuple[str, ...]] = Counter()
        data = self._reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
                for point in metric.data.data_points if metric.name == name else ():
                    values = tuple(str(value) for value in (point.attributes or {}).values())
                    totals[values] = getattr(point, "sum", getattr(point, "value", 0))
        return totals
