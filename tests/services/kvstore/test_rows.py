"""Rows by name: a dict would answer the same, also for names that want the same place."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.kvstore.rows import NOBODY, Rows, leading

# The order of a name's words does not change its hash: all of these want one place.
WORDS = [bytes([n]) * 8 for n in (0, 0, 1, 7)]
COLLIDING = sorted({b"".join(words) for words in itertools.permutations(WORDS)})
OTHERS = [bytes([n]) * 32 for n in range(6)]
NAMES = COLLIDING + OTHERS


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.booleans()), max_size=80))
def test_names_come_and_go_as_in_a_dict(steps: list[tuple[bytes, bool]]) -> None:
    rows, expected = Rows(), {}
    for name, is_there in steps:
        if is_there and name not in expected:
            expected[name] = rows.add(name)
        elif not is_there and name in expected:
            row = expected.pop(name)
            rows.unname(row)
            rows.free(row)
        rows.check()
    assert len(rows) == len(expected) == len(set(expected.values()))
    wanted = [expected.get(name, NOBODY) for name in NAMES]
    assert rows.find(NAMES).tolist() == wanted
    assert [rows.row_of(name) for name in NAMES] == wanted
    assert {rows.name_of(row): row for row in rows.named().tolist()} == expected


def test_growing_keeps_names_and_values() -> None:
    rows = Rows()
    column = rows.column(np.int32)
    names = [b"%032d" % n for n in range(5000)]
    for number, name in enumerate(names):
        row = rows.add(name)
        column.at[row] = number
    assert column.values[rows.find(names)].tolist() == list(range(5000))
    assert rows.find([b"x" * 32]).tolist() == [NOBODY]
    rows.check()


def test_a_nameless_row_is_not_reused_before_it_is_free() -> None:
    rows = Rows()
    first = rows.add(b"a" * 32)
    rows.unname(first)
    assert rows.row_of(b"a" * 32) == NOBODY
    second = rows.add(b"a" * 32)
    assert second != first
    rows.free(first)
    assert rows.add(b"b" * 32) == first


def test_leading_rows_end_before_the_first_unwanted() -> None:
    rows = np.array([5, 6, 7])
    assert leading(rows, np.array([True, False, True])).tolist() == [5]
    assert leading(rows, np.array([True, True, True])).tolist() == [5, 6, 7]
    assert leading(rows[:0], np.array([], dtype=bool)).tolist() == []
