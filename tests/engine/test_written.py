"""KV that is in the cache before its step is over: who is told, when, and what the mark reports."""

from __future__ import annotations

import pytest
import torch

from engine.written import WrittenMark
from tests.support.engine_bench import is_over, running, sequence

TAKES_LONG = {"is_done": False, "is_written": True}


async def test_a_listener_hears_of_kv_before_the_step_lands() -> None:
    async with running(8) as bench:
        events: list[tuple[str, int]] = []
        bench.runner.step = TAKES_LONG
        bench.engine.tell_written(lambda _, num_tokens: events.append(("written", num_tokens)))
        bench.after_step = lambda outcome: events.append(
            ("landed", outcome.items[0].num_computed_after)
        )
        one = sequence(1, list(range(10)), max_new_tokens=3)
        one.blocks = await bench.engine.allocate(bench.pool.num_blocks_for(10))
        bench.engine.add(one)
        await bench.until(is_over(one))
        told = [event for event in events if event[0] == "landed"]
        assert [num_tokens for _, num_tokens in told] == [8, 10, 11, 12]
        for name, num_tokens in told:
            assert events.index(("written", num_tokens)) < events.index((name, num_tokens))


@pytest.mark.parametrize("step", [{"is_done": True, "is_written": True}, {"is_done": False}])
async def test_nobody_hears_of_a_step_that_is_over_at_once_or_does_not_report(
    step: dict[str, bool],
) -> None:
    async with running(8) as bench:
        told: list[int] = []
        bench.runner.step = step
        bench.engine.tell_written(lambda _, num_tokens: told.append(num_tokens))
        one = sequence(1, [1, 2, 3], max_new_tokens=2)
        one.blocks = await bench.engine.allocate(2)
        bench.engine.add(one)
        await bench.until(is_over(one))
        assert not told


async def test_a_step_may_fail_after_its_kv_was_told_of() -> None:
    async with running(8) as bench:
        told: list[int] = []
        bench.runner.step = TAKES_LONG
        bench.runner.failure = RuntimeError("NaN")
        bench.engine.tell_written(lambda _, num_tokens: told.append(num_tokens))
        one = sequence(1, [1, 2, 3], max_new_tokens=2)
        one.blocks = await bench.engine.allocate(2)
        bench.engine.add(one)
        await bench.until(lambda: bool(bench.failures))
        assert told == [3] and not bench.items


def test_the_mark_reports_a_step_after_its_last_pass() -> None:
    mark = WrittenMark(torch.device("cpu"))
    first, second = mark.next_step(), mark.next_step()
    mark.begin(first, is_last=False)
    mark.enqueue()
    assert not mark.has(first)
    mark.begin(first, is_last=True)
    mark.enqueue()
    assert mark.has(first) and not mark.has(second)
    assert mark.wait(first, lambda: pytest.fail("it is there"))


def test_waiting_ends_with_the_step_and_raises_what_the_device_raised() -> None:
    mark = WrittenMark(torch.device("cpu"))
    number = mark.next_step()
    answers = iter([False, True])
    assert not mark.wait(number, lambda: next(answers))

    def broken() -> bool:
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        mark.wait(number, broken)
