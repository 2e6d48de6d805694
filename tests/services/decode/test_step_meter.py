"""What a step did is told twice, as metrics and in the status, and both say the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from engine.sequence import StepOutcome
from mesh import buckets
from services.decode.step_meter import StepMeter
from tests.support.meters import Meters

TOKENS = "kvmesh.decode.tokens"


class Rank:
    """A meter over an engine that is only numbers."""

    def __init__(self) -> None:
        self.engine = SimpleNamespace(num_running=3, num_waiting=2, num_preemptions=0)
        self.meters = Meters()
        self.meter = StepMeter(
            self.engine,  # pyright: ignore[reportArgumentType]
            self.meters.telemetry,
        )

    def step(self, *items: Any, **values: Any) -> int:
        given = {
            "step": 1,
            "schedule_s": 0.001,
            "forward_s": 0.004,
            "sample_s": 0.002,
            "gap_s": 0.0005,
            "emit_s": 0.0001,
            "num_cancelled": 0,
            "num_discarded": 0,
            "graph_rows": None,
            "done_at": 0.0,
            "items": list(items),
        }
        return self.meter.record(StepOutcome(**{**given, **values}))


def item(sequence: object, num_computed: int = 1, *token_ids: int) -> Any:
    return SimpleNamespace(
        sequence=sequence,
        num_computed_before=0,
        num_computed_after=num_computed,
        token_ids=token_ids,
    )


def test_every_token_has_one_disposition() -> None:
    rank, one, other = Rank(), object(), object()
    # One goes on; the other computes five tokens again before it does.
    assert rank.step(item(one, 1, 7), item(other, 6, 8), num_cancelled=2, num_discarded=1) == 2
    assert rank.step(item(other, 4)) == 0
    sums = rank.meter.snapshot()
    assert (sums.num_delivered, sums.num_recomputed) == (2, 5 + 4)
    assert (sums.num_cancelled, sums.num_discarded) == (2, 1)
    assert rank.meters.totals(TOKENS) == {
        ("delivered",): 2,
        ("recomputed",): 9,
        ("cancelled",): 2,
        ("discarded",): 1,
    }


def test_parts_of_steps_add_up() -> None:
    rank = Rank()
    rank.step(item(object(), 1, 7))
    rank.step(item(object(), 1, 7), forward_s=0.006)
    sums = rank.meter.snapshot()
    assert sums.num_steps == 2 and round(sums.forward_s, 6) == 0.01
    parts = rank.meters.totals("kvmesh.decode.step.part.duration")
    assert {part: round(total, 6) for (part,), total in parts.items()} == {
        "schedule": 0.002,
        "forward": 0.01,
        "sample": 0.004,
        "emit": 0.0002,
    }
    assert round(rank.meters.totals("kvmesh.decode.step.gap")[()], 6) == round(sums.gap_s, 6)
    assert sum(sums.steps_by_duration) == sum(sums.steps_by_tokens) == 2
    assert sums.steps_by_tokens[buckets.COUNTS.index(1)] == 2
    assert sums.steps_by_duration[buckets.STEP_S.index(0.0075)] == 1  # 6 ms
    assert (sums.num_running, sums.num_waiting) == (3, 2)


def test_a_graph_is_hit_with_padding_or_missed() -> None:
    rank = Rank()
    rank.step(item(object(), 1, 7))  # a CPU: neither
    rank.step(*(item(object(), 1, 7) for _ in range(5)), graph_rows=8, num_discarded=1)
    rank.step(item(object(), 3, 7), graph_rows=0)
    sums = rank.meter.snapshot()
    assert (sums.num_graph_hits, sums.num_graph_misses, sums.num_padding) == (1, 1, 2)
    graphs = rank.meters.totals("kvmesh.decode.step.graphs")
    assert graphs == {("hit",): 1, ("miss",): 1}
    assert rank.meters.totals("kvmesh.decode.step.padding")[()] == 2


def test_time_between_tokens_is_of_sequences_that_got_both() -> None:
    rank, one, other = Rank(), object(), object()
    rank.step(item(one, 1, 7))
    rank.step(item(other, 1, 7))  # another's first: no time between
    assert sum(rank.meter.snapshot().steps_by_inter_token) == 0
    rank.step(item(one, 2), item(other, 1, 7))
    assert sum(rank.meter.snapshot().steps_by_inter_token) == 1


def test_preemptions_are_counted_as_they_come() -> None:
    rank = Rank()
    rank.step(item(object(), 1, 7))
    rank.engine.num_preemptions = 3
    rank.step(item(object(), 1, 7))
    rank.step(item(object(), 1, 7))
    assert rank.meter.snapshot().num_preemptions == 3
    assert rank.meters.totals("kvmesh.decode.preemptions")[()] == 3
