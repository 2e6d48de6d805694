"""The tuner finds an acceptable entry for every operation; a stopped clock, nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kernels.tile_search import Search
from kernels.tunable import OPS, make_tunable

pytestmark = pytest.mark.gpu

KEYS = {
    "fp8_gemm": "512x1024",
    "gemm": "512x1024",
    "paged_decode": "16x4x128",
    "rmsnorm": "512",
}


def call_once(calls: Sequence[Callable[[], object]]) -> float:
    calls[0]()
    return 1.0


@pytest.mark.parametrize("op", OPS)
def test_some_configuration_is_right_at_every_row_count(op: str) -> None:
    lines: list[str] = []
    tunable = make_tunable(op, KEYS[op], 512)
    entry = Search(tunable=tunable, timer=call_once, report=lines.append).run([1, 64, 512], {})
    assert entry is not None, "\n".join(lines)
    assert [limit for limit, _ in entry.rows] == [1, 64, 512]
