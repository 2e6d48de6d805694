"""docs/telemetry.md is what the tables say; whatever is renamed shows in its diff."""

from __future__ import annotations

import re

from mesh.instruments import ALL, RECORDED
from mesh.metric import Kind
from mesh.spans import ALL as SPANS
from mesh.spans import ATTRIBUTES
from tools.telemetry_docs import PATH, render


def test_the_page_is_up_to_date() -> None:
    assert PATH.read_text() == render(), "run `make docs`"


def test_names_and_units_are_of_one_form() -> None:
    names = [metric.name for metric in ALL.values()]
    assert len(names) == len(set(names))
    for metric in ALL.values():
        assert re.fullmatch(r"(gen_ai\.server|kvmesh)(\.[a-z][a-z_]*)+", metric.name)
        assert metric.unit in ("s", "By", "1") or re.fullmatch(r"\{[a-z]+\}", metric.unit)
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        for values in metric.attributes.values():
            assert values and len(values) == len(set(values))


def test_what_is_recorded_is_a_counter_or_a_histogram() -> None:
    assert {m.kind for m in RECORDED.values()} == {Kind.COUNTER, Kind.HISTOGRAM}


def test_every_attribute_of_a_span_is_explained_and_used() -> None:
    used = {name for span_type in SPANS for name in (*span_type.attributes, *span_type.fixed)}
    assert used == set(ATTRIBUTES)
    for name in used:
        assert re.fullmatch(r"(gen_ai|rpc|server|error|kvmesh)(\.[a-z][a-z_]*)+", name)


def test_every_span_has_a_name_of_its_own_in_the_process_that_makes_it() -> None:
    names = [(role, s.name, s.kind) for s in SPANS for role in s.made_by]
    assert len(names) == len(set(names))
    assert all(set(span_type.fixed) <= set(span_type.attributes) for span_type in SPANS)
