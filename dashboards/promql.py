"""Queries over the metrics of `mesh.instruments`, by the names Prometheus gives them.

A metric is named by its key in that table, so a query of an undeclared metric, attribute or value
cannot be written. Each query knows its unit, as Grafana names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.instruments import ALL, ERROR_REASON
from mesh.metric import Kind, Metric

SHARE, SECONDS, NUMBER = "percentunit", "s", "short"
WINDOW = "$__rate_interval"
_SUFFIXES = {"s": "_seconds", "By": "_bytes"}
_LEVELS = {"s": SECONDS, "By": "bytes", "1": SHARE}
_COUNTED = (Kind.COUNTER, Kind.OBSERVED_COUNTER)
Where = str | tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """A query's text and Grafana's id of the unit of what it gives."""

    text: str
    unit: str


SERVICES = Expression(
    text='sum by (instance, service_name) (target_info{instance=~"$instance"})', unit=NUMBER
)
"""1 for each instance, with its role in the service's name; OpenTelemetry's exporters say it."""


def exported_name(metric: Metric) -> str:
    """What the Prometheus exporter calls a metric; of a histogram without _bucket, _sum, _count."""
    name = metric.name.replace(".", "_") + _SUFFIXES.get(metric.unit, "")
    return f"{name}_total" if metric.kind in _COUNTED else name


def level(key: str, *, by: str = "", **where: Where) -> Expression:
    """The sum over instances of a gauge, or of a counter since its processes started."""
    metric = ALL[key]
    text = f"sum{_grouped(metric, by)} ({_series(metric, '', where)})"
    return Expression(text=text, unit=_unit(metric))


def rate(key: str, *, by: str = "", **where: Where) -> Expression:
    """A counter's growth a second."""
    return Expression(text=_rate(key, "", by, where), unit=per_second(ALL[key].unit))


def growth(key: str, *, by: str = "", **where: Where) -> Expression:
    """A counter's growth from one point of a graph to the next."""
    metric = ALL[key]
    text = f"sum{_grouped(metric, by)} (increase({_series(metric, '', where)}[{WINDOW}]))"
    return Expression(text=text, unit=NUMBER)


def entries(key: str, noun: str, *, by: str = "", **where: Where) -> Expression:
    """Values that a histogram took a second; `noun`, such as {step}, is what one stands for."""
    return Expression(text=_rate(key, "_count", by, where), unit=per_second(noun))


def volume(key: str, *, by: str = "", **where: Where) -> Expression:
    """What a histogram's values add up to a second: of durations, the share of time they took."""
    unit = ALL[key].unit
    return Expression(
        text=_rate(key, "_sum", by, where), unit=SHARE if unit == "s" else per_second(unit)
    )


def mean(key: str, *, by: str = "", **where: Where) -> Expression:
    """A histogram's mean value."""
    text = f"{_rate(key, '_sum', by, where)} / {_rate(key, '_count', by, where)}"
    return Expression(text=text, unit=_unit(ALL[key]))


def quantile(q: float, key: str, *, by: str = "", **where: Where) -> Expression:
    """An estimate of the value that a share `q` of a histogram's values stays below."""
    inner = buckets(key, by=by, **where)
    return Expression(text=f"histogram_quantile({q:g}, {inner.text})", unit=inner.unit)


def buckets(key: str, *, by: str = "", **where: Where) -> Expression:
    """A histogram's buckets, as a heat map takes them; the unit is that of the values."""
    labels = f"le, {by}" if by else "le"
    return Expression(text=_rate(key, "_bucket", labels, where), unit=_unit(ALL[key]))


def within(key: str, choice: str) -> Expression:
    """The share of a histogram's values up to the boundary that `$choice` stands for."""
    met = _series(ALL[key], "_bucket", {}, f'le=~"${choice}"')
    text = f"sum (rate({met}[{WINDOW}])) / {_rate(key, '_count', '', {})}"
    return Expression(text=text, unit=SHARE)


def shared_out(key: str, attribute: str, value: str, **where: Where) -> Expression:
    """One attribute value's part of a mean, such that all parts add up.

    Divides by how often the most frequent value came, as some may be absent now and then.
    """
    part = _rate(key, "_sum", "", {**where, attribute: value})
    return Expression(
        text=f"{part} / max({_rate(key, '_count', attribute, where)})", unit=_unit(ALL[key])
    )


def ratio(part: Expression, whole: Expression, unit: str = SHARE) -> Expression:
    """One query divided by another that has the same labels."""
    return Expression(text=f"{_term(part)} / {_term(whole)}", unit=unit)


def rest(part: Expression, whole: Expression) -> Expression:
    """The share of a whole that a part leaves."""
    return Expression(text=f"1 - {ratio(part, whole).text}", unit=SHARE)


def together(*terms: Expression) -> Expression:
    """The sum of queries that have the same labels."""
    return Expression(text=" + ".join(term.text for term in terms), unit=terms[0].unit)


def share(key: str, *, by: str) -> Expression:
    """Each attribute value's share in a counter's growth."""
    part, whole = _rate(key, "", by, {}), _rate(key, "", "", {})
    return Expression(text=f"{part} / ignoring({by}) group_left {whole}", unit=SHARE)


def boundary(bound_s: float) -> str:
    """A pattern of a bucket's `le` label: exporters write 1 or 1.0."""
    return "|".join(dict.fromkeys((f"{bound_s:g}", str(bound_s))))


def per_second(unit: str) -> str:
    """Grafana's id of a metric's unit a second."""
    if unit == "By":
        return "Bps"
    noun = unit.strip("{}")
    return f"suffix: {noun[:-1] + 'ie' if noun.endswith('y') else noun}s/s"


def _term(expression: Expression) -> str:
    return f"({expression.text})" if " + " in expression.text else expression.text


def _unit(metric: Metric) -> str:
    return _LEVELS.get(metric.unit, NUMBER)


def _rate(key: str, suffix: str, by: str, where: Mapping[str, Where]) -> str:
    metric = ALL[key]
    return f"sum{_grouped(metric, by)} (rate({_series(metric, suffix, where)}[{WINDOW}]))"


def _grouped(metric: Metric, by: str) -> str:
    labels = [label.strip() for label in by.split(",")] if by else []
    for label in labels:
        if label not in ("instance", "le", *metric.attributes):
            raise ValueError(f"{metric.name} has no attribute {label!r} to group by")
    return f" by ({', '.join(labels)})" if labels else ""


def _series(metric: Metric, suffix: str, where: Mapping[str, Where], *matchers: str) -> str:
    """A selector of the chosen instances; ValueError: a value that the metric never has."""
    for label, wanted in where.items():
        values = (wanted,) if isinstance(wanted, str) else wanted
        allowed = metric.attributes.get(label, ())
        if unknown := [v for v in values if v not in allowed and allowed != ERROR_REASON]:
            raise ValueError(f"{metric.name} has no {label} {unknown}, it has {list(allowed)}")
        matchers = (*matchers, f'{label}{"=" if len(values) == 1 else "=~"}"{"|".join(values)}"')
    inside = ", ".join(('instance=~"$instance"', *matchers))
    return f"{exported_name(metric)}{suffix}{{{inside}}}"
