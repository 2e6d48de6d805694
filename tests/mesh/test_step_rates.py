"""Rates, percentiles and shares out of two statuses."""

from __future__ import annotations

import pytest

from mesh import buckets
from mesh.step_rates import Board, RateTracker, quantile
from protos import status_pb2


def rank(
    *,
    uptime_s: float,
    num_steps: int = 0,
    address: str = "a:1",
    life: str = "one",
    ready: bool = True,
    more: status_pb2.DecodeSteps | None = None,
) -> status_pb2.InstanceStatus:
    """A decode rank whose steps delivered 8 tokens each, in 20 ms, and what `more` says."""
    steps = status_pb2.DecodeSteps(
        num_steps=num_steps,
        forward_s=0.012 * num_steps,
        sample_s=0.002 * num_steps,
        schedule_s=0.001 * num_steps,
        emit_s=0.001 * num_steps,
        gap_s=0.004 * num_steps,
        num_delivered=8 * num_steps,
        steps_by_tokens=[num_steps if row == 3 else 0 for row in range(len(buckets.COUNTS) + 1)],
        steps_by_duration=[0] * (len(buckets.STEP_S) + 1),
        steps_by_inter_token=[
            num_steps if row == 6 else 0 for row in range(len(buckets.PER_TOKEN_S) + 1)
        ],
    )
    if more is not None:
        steps.MergeFrom(more)
    return status_pb2.InstanceStatus(
        role=status_pb2.ROLE_DECODE,
        address=address,
        incarnation=life,
        ready=ready,
        counts=status_pb2.Counts(num_tokens=8 * num_steps, num_requests=3),
        model=status_pb2.WorkerModel(name="demo"),
        decode_steps=steps,
        uptime_s=uptime_s,
    )


def looks(*statuses: list[status_pb2.InstanceStatus]) -> Board:
    """The last board of several looks."""
    tracker = RateTracker()
    return [tracker.observe(status) for status in statuses][-1]


def test_the_first_look_tells_no_rates() -> None:
    board = looks([rank(uptime_s=5, num_steps=100)])
    assert board.rates is None and board.model == "demo"
    assert board.instances[0].tokens_per_s is None and board.instances[0].num_requests == 3


def test_rates_are_by_the_ranks_own_clock() -> None:
    board = looks([rank(uptime_s=5.0, num_steps=100)], [rank(uptime_s=7.5, num_steps=150)])
    assert board.rates is not None
    assert board.rates.steps_per_s == pytest.approx(20)
    assert board.rates.tokens_per_s == pytest.approx(160)
    assert board.instances[0].tokens_per_s == pytest.approx(160)


def test_parts_are_means_of_a_step_and_the_gap_is_a_share_of_them() -> None:
    board = looks([rank(uptime_s=1, num_steps=1)], [rank(uptime_s=2, num_steps=51)])
    assert board.rates is not None and board.rates.parts_s is not None
    assert board.rates.parts_s["forward"] == pytest.approx(0.012)
    assert sum(board.rates.parts_s.values()) == pytest.approx(0.020)
    assert board.rates.gap_share == pytest.approx(0.2)


def test_wasted_tokens_are_a_share_of_all_computed() -> None:
    more = status_pb2.DecodeSteps(num_cancelled=5, num_discarded=10, num_recomputed=5)
    board = looks([rank(uptime_s=1)], [rank(uptime_s=2, num_steps=10, more=more)])
    assert board.rates is not None
    assert board.rates.wasted_shares == {"cancelled": 0.05, "discarded": 0.1, "recomputed": 0.05}
    assert board.rates.wasted_share == pytest.approx(0.2)


def test_ranks_add_up() -> None:
    more = status_pb2.DecodeSteps(num_running=2, num_waiting=1, num_preemptions=3)
    board = looks(
        [rank(uptime_s=1), rank(uptime_s=1, address="b:1")],
        [
            rank(uptime_s=2, num_steps=10, more=more),
            rank(uptime_s=3, num_steps=10, address="b:1", more=more),
        ],
    )
    assert board.rates is not None
    assert board.rates.steps_per_s == pytest.approx(15)
    assert board.rates.preemptions_per_s == pytest.approx(4.5)
    assert (board.rates.num_running, board.rates.num_waiting) == (4, 2)
    assert sum(board.rates.steps_by_tokens) == 20
    assert [instance.name for instance in board.instances] == ["decode 0", "decode 1"]


def test_a_rank_that_was_not_asked_anew_keeps_its_rates_while_it_is_ready() -> None:
    first, second = [rank(uptime_s=1)], [rank(uptime_s=2, num_steps=30)]
    kept = looks(first, second, second)
    assert kept.rates is not None and kept.rates.steps_per_s == pytest.approx(30)
    lost = looks(first, second, [rank(uptime_s=2, num_steps=30, ready=False)])
    assert lost.rates is None and lost.instances[0].steps is None


def test_a_restarted_rank_begins_anew() -> None:
    board = looks([rank(uptime_s=90, num_steps=900)], [rank(uptime_s=91, life="two", num_steps=3)])
    assert board.rates is None


def test_an_idle_rank_has_rates_of_zero_and_no_percentiles() -> None:
    board = looks([rank(uptime_s=1, num_steps=5)], [rank(uptime_s=2, num_steps=5)])
    assert board.rates is not None and board.rates.tokens_per_s == 0
    assert board.rates.step_tokens_p50 is None and board.rates.inter_token_p95_s is None
    assert board.rates.parts_s is None and board.rates.wasted_share is None


@pytest.mark.parametrize(
    ("counts", "q", "expected"),
    [
        ([0, 0, 0, 0], 0.5, None),
        ([4, 0, 0, 0], 0.5, 0.5),
        ([0, 4, 0, 0], 0.5, 1.5),
        ([2, 0, 2, 0], 0.5, 1.0),
        ([2, 0, 2, 0], 0.75, 3.0),
        ([0, 0, 0, 7], 0.5, 4.0),  # beyond the last bound nothing is known
        ([3, 3, 3, 0], 1.0, 4.0),
    ],
)
def test_quantiles_are_interpolated(counts: list[int], q: float, expected: float | None) -> None:
    assert quantile(counts, (1.0, 2.0, 4.0), q) == expected


def test_quantiles_of_whole_numbers_are_values_that_occur() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert quantile([9, 0, 0, 0], bounds, 0.5, is_whole=True) == 1.0
    assert quantile([0, 9, 0, 0], bounds, 0.1, is_whole=True) == 2.0
    assert quantile([0, 0, 9, 0], bounds, 0.1, is_whole=True) == 3.0
