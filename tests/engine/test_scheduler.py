"""Which sequences run, with how many tokens, and who gives way."""

from __future__ import annotations

import pytest

from engine.block_pool import BlockPool
from engine.plan import ChunkResult, SamplingParams, StoppingParams
from engine.scheduler import DecodeScheduler, PrefillScheduler, Scheduled, Scheduler
from engine.sequence import Sequence, SequenceState


def sequence(key: str, num_tokens: int, priority: int = 0, **changes: object) -> Sequence:
    return Sequence(
        key,
        list(range(num_tokens)),
        (1,),
        SamplingParams(),
        StoppingParams(max_new_tokens=99),
        priority=priority,
        **changes,  # type: ignore[arg-type]
    )


def step(scheduler: Scheduler, pool: BlockPool) -> list[tuple[object, int]]:
    """Schedules, pretends to compute, and tells who ran with how many tokens."""
    batch: list[Scheduled] = scheduler.schedule(pool)
    scheduler.check(pool)
    for one, chunk in batch:
        one.advance(chunk, ChunkResult(token_ids=(0,) if chunk.sample else ()))
    return [(one.key, len(chunk.token_ids)) for one, chunk in batch]


def test_prefill_deals_its_budget_in_order_of_priority_then_arrival() -> None:
    scheduler, pool = PrefillScheduler(max_batch=4, chunk_tokens=8), BlockPool(16, 4)
    for key, num_tokens, priority in (("a", 6, 0), ("b", 6, 0), ("c", 3, 1)):
        scheduler.add(sequence(key, num_tokens, priority))
    assert step(scheduler, pool) == [("c", 3), ("a", 5)]


def test_a_prompt_starts_only_with_all_its_blocks_and_holds_up_later_ones() -> None:
    scheduler, pool = PrefillScheduler(max_batch=4, chunk_tokens=8), BlockPool(4, 4)
    for key, num_tokens in (("a", 12), ("b", 8), ("c", 4)):
        scheduler.add(sequence(key, num_tokens))
    assert step(scheduler, pool) == [("a", 8)]
    assert (scheduler.num_running, scheduler.num_waiting, pool.num_free) == (1, 2, 1)


def test_waiting_prompts_with_blocks_give_way_when_nothing_runs() -> None:
    scheduler, pool = PrefillScheduler(max_batch=4, chunk_tokens=8), BlockPool(4, 4)
    first, second = sequence("a", 12), sequence("b", 12)
    first.blocks, second.blocks = pool.allocate(2), pool.allocate(2)
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler, pool) == [("a", 8)]
    assert (second.blocks, second.num_preemptions) == ([], 1)


@pytest.mark.parametrize("scheduler_class", [PrefillScheduler, DecodeScheduler])
def test_no_step_exceeds_max_batch(scheduler_class: type[Scheduler]) -> None:
    scheduler, pool = scheduler_class(max_batch=2, chunk_tokens=8), BlockPool(16, 4)
    for key in "abc":
        scheduler.add(sequence(key, 1))
    assert step(scheduler, pool) == [("a", 1), ("b", 1)]


def test_decode_runs_everyone_and_recomputes_within_the_budget() -> None:
    scheduler, pool = DecodeScheduler(max_batch=8, chunk_tokens=6), BlockPool(32, 4)
    ready = sequence("ready", 5)
    ready.blocks, ready.num_computed = pool.allocate(1), 4
    for one in (sequence("x", 10), ready, sequence("y", 4)):
        scheduler.add(one)
    assert step(scheduler, pool) == [("x", 6), ("ready", 1)]
    assert step(scheduler, pool) == [("x", 4), ("ready", 1), ("y", 2)]
    assert step(scheduler, pool) == [("x", 1), ("ready", 1), ("y", 2)]
    assert step(scheduler, pool) == [("x", 1), ("ready", 1), ("y", 1)]


def test_the_newest_of_the_lowest_priority_gives_its_blocks_up() -> None:
    scheduler, pool = DecodeScheduler(max_batch=8, chunk_tokens=64), BlockPool(3, 4)
    low, high, new = sequence("low", 4), sequence("high", 4, 1), sequence("new", 4)
    for one in (low, high, new):
        scheduler.add(one)
    assert step(scheduler, pool) == [("high", 4), ("low", 4), ("new", 4)]
    assert step(scheduler, pool) == [("high", 1)]
    assert new.state is low.state is SequenceState.WAITING
    assert (new.num_computed, new.blocks) == (0, [])
    assert scheduler.num_preemptions == 2


def test_a_preempted_sequence_comes_back_before_newcomers() -> None:
    scheduler, pool = DecodeScheduler(max_batch=8, chunk_tokens=64), BlockPool(3, 4)
    first, second = sequence("first", 7), sequence("second", 4)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler, pool)
    step(scheduler, pool)
    step(scheduler, pool)
    assert second.state is SequenceState.WAITING
    scheduler.add(sequence("third", 1))
    scheduler.remove(first)
    pool.free(first.blocks)
    assert [key for key, _ in step(scheduler, pool)] == ["second", "third"]


def test_newcomers_leave_headroom_and_wait_behind_starving_sequences() -> None:
    scheduler, pool = DecodeScheduler(max_batch=8, chunk_tokens=64), BlockPool(8, 4)
    scheduler.add(sequence("runs", 4))
    assert scheduler.num_spare(0, pool) == 8
    step(scheduler, pool)
    assert scheduler.num_spare(0, pool) == pool.num_free - 1
    scheduler.add(sequence("starves", 32))
    assert scheduler.num_spare(0, pool) == 0
    assert scheduler.num_spare(1, pool) == pool.num_free - 1


def test_decode_refuses_what_it_cannot_run() -> None:
    scheduler = DecodeScheduler(max_batch=1, chunk_tokens=1)
    many = Sequence("k", [1], (1, 2), SamplingParams(), StoppingParams(max_new_tokens=1))
    with pytest.raises(ValueError, match="seeds: 2"):
        scheduler.validate(many)
    with pytest.raises(ValueError, match="num_prompt_logprobs"):
        scheduler.validate(sequence("k", 1, num_prompt_logprobs=1))
    with pytest.raises(ValueError, match="max_batch 0"):
        DecodeScheduler(max_batch=0, chunk_tokens=1)
