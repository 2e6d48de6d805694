"""Bounds, merging and cutting of runs."""

from __future__ import annotations

import numpy as np
import pytest

from kv.transfer import MAX_SPAN_NUM_BYTES, Spans, group, spans

ARENA = 2**40


def _spans(local: list[int], remote: list[int], num_bytes: int, arena: int = ARENA) -> Spans:
    return spans(local, remote, num_bytes, local_num_bytes=arena, remote_num_bytes=arena)


def _rows(whole: Spans) -> list[tuple[int, int, int]]:
    columns = (whole.local_offsets, whole.remote_offsets, whole.lengths)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_runs_adjacent_on_both_sides_merge() -> None:
    assert _rows(_spans([0, 10, 20, 40], [100, 110, 130, 140], 10)) == [
        (0, 100, 20),
        (20, 130, 10),
        (40, 140, 10),
    ]


def test_descending_runs_merge_too() -> None:
    assert _rows(_spans([20, 10, 0], [220, 210, 200], 10)) == [(0, 200, 30)]


def test_spans_are_cut_at_the_limit() -> None:
    size = 2 * MAX_SPAN_NUM_BYTES + 7
    whole = _spans([0, 5 * size], [size, 7 * size], size)
    assert whole.lengths.tolist() == [MAX_SPAN_NUM_BYTES, MAX_SPAN_NUM_BYTES, 7] * 2
    assert whole.local_offsets.tolist()[3:5] == [5 * size, 5 * size + MAX_SPAN_NUM_BYTES]
    assert whole.remote_offsets.tolist()[1] == size + MAX_SPAN_NUM_BYTES


def test_groups_cover_everything_in_order() -> None:
    generator = np.random.default_rng(0)
    offsets = (generator.permutation(500) * 20).tolist()
    whole = _spans(offsets, offsets[::-1], 10)
    groups = group(whole, 300)
    assert [row for part in groups for row in _rows(part)] == _rows(whole)
    assert all(part.lengths.sum() < 300 + 10 for part in groups)
    assert group(_spans([], [], 1), 300) == []


@pytest.mark.parametrize(
    ("local", "remote", "num_bytes", "message"),
    [
        ([0], [91], 10, r"remote_offsets\[0\]: 91; a run of 10 bytes must lie in an arena of 100"),
        ([0, 95], [0, 10], 10, r"local_offsets\[1\]: 95"),
        ([-10], [0], 10, r"local_offsets\[0\]: -10"),
        ([2**64 - 5], [0], 10, r"local_offsets\[0\]: 18446744073709551611"),
        ([2**80], [0], 10, "local_offsets: dtype object"),
        ([0.5], [0], 10, "local_offsets: dtype float64"),
        ([0], [0], 101, r"local_offsets\[0\]"),
        ([0], [0], 0, "num_bytes: 0"),
        ([0, 10], [0], 10, "local_offsets: 2 entries; remote_offsets has 1"),
    ],
)
def test_what_leaves_an_arena_is_refused(
    local: list[int], remote: list[int], num_bytes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _spans(local, remote, num_bytes, arena=100)


def test_the_last_run_of_an_arena_is_allowed() -> None:
    assert _rows(_spans([90], [90], 10, arena=100)) == [(90, 90, 10)]
