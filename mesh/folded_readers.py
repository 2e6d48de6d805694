"""Readers of the SDK that export a process's folds with everything else. Imported with the SDK."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricReader,
    MetricsData,
)

from mesh.folds import Fold, Folds
from mesh.instruments import STEPS


def folded(kind: type[MetricReader], folds: Folds) -> type[Any]:
    """A class of readers like `kind` whose exports have the folds, too; always cumulative."""
    started_ns = time.time_ns()

    class Folded(kind):
        def _receive_metrics(self, metrics_data: MetricsData, *args: Any, **kwargs: Any) -> None:
            made = [_metric(key, series, started_ns) for key, series in folds]
            super()._receive_metrics(_with(metrics_data, made), *args, **kwargs)

    return Folded


def _with(data: MetricsData, made: list[Metric]) -> MetricsData:
    """The same with more metrics in its first scope: there is one, of the process's one meter."""
    if not made:
        return data
    resource, *_ = data.resource_metrics
    scope, *_ = resource.scope_metrics
    scope = dataclasses.replace(scope, metrics=[*scope.metrics, *made])
    return MetricsData(resource_metrics=[dataclasses.replace(resource, scope_metrics=[scope])])


def _metric(key: str, series: list[tuple[Any, Fold]], started_ns: int) -> Metric:
    declared, now_ns = STEPS[key], time.time_ns()
    points: list[HistogramDataPoint] = []
    for attributes, fold in series:
        counts = list(fold.counts)
        points.append(
            HistogramDataPoint(
                attributes=attributes,
                start_time_unix_nano=started_ns,
                time_unix_nano=now_ns,
                count=sum(counts),
                sum=fold.sum,
                bucket_counts=counts,
                explicit_bounds=fold.bounds,
                min=None,  # pyright: ignore[reportArgumentType] - optional in OTLP
                max=None,  # pyright: ignore[reportArgumentType]
            )
        )
    data = Histogram(data_points=points, aggregation_temporality=AggregationTemporality.CUMULATIVE)
    return Metric(
        name=declared.name, description=declared.description, unit=declared.unit, data=data
    )
