"""How a metric is declared: its name, unit, buckets and the values its attributes may have."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Kind(enum.Enum):
    """What an instrument does with values."""

    HISTOGRAM = "histogram"
    COUNTER = "counter"
    GAUGE = "observed gauge"
    OBSERVED_COUNTER = "observed counter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One instrument's declaration; attributes: name to the values it may have."""

    name: str
    kind: Kind
    unit: str
    description: str
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


def histogram(
    name: str, unit: str, text: str, bounds: tuple[float, ...], **attributes: tuple[str, ...]
) -> Metric:
    """Declares a histogram with these bounds."""
    return Metric(
        name=name,
        kind=Kind.HISTOGRAM,
        unit=unit,
        description=text,
        attributes=attributes,
        buckets=bounds,
    )


def counter(name: str, unit: str, text: str, **attributes: tuple[str, ...]) -> Metric:
    """Declares a counter."""
    return Metric(name=name, kind=Kind.COUNTER, unit=unit, description=text, attributes=attributes)


def observed(
    name: str, unit: str, text: str, kind: Kind = Kind.GAUGE, **attributes: tuple[str, ...]
) -> Metric:
    """Declares what a callback tells."""
    return Metric(name=name, kind=kind, unit=unit, description=text, attributes=attributes)
