"""The step loop over a fake runner whose tokens depend on what the blocks really hold."""

from __future__ import annotations

import asyncio
import concurrent.futures

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.engine import EngineClosedError
from engine.plan import FinishReason, SamplingParams, StoppingParams
from engine.scheduler import DecodeScheduler, PrefillScheduler
from engine.sequence import Sequence, SequenceState, StepOutcome
from tests.support.engine_bench import (
    BLOCK_TOKENS,
    is_over,
    next_token,
    running,
    sequence,
    undisturbed,
)


async def test_outputs_equal_the_model_alone_and_blocks_return() -> None:
    async with running(32) as bench:
        batch = [sequence(key, list(range(key, key + 3 * key + 1)), 9) for key in range(6)]
        for one in batch:
            bench.engine.add(one)
        await bench.until(is_over(*batch))
        for one in batch:
            assert one.output_token_ids == undisturbed(one.prompt_token_ids, 9)
            assert one.finish_reason is FinishReason.LENGTH
        assert bench.pool.num_free == 32
        assert max(map(sum, bench.runner.batch_lens)) <= 8 + 8


async def test_a_step_is_launched_before_the_tokens_it_continues_are_known() -> None:
    async with running(32) as bench:
        short, long = sequence(1, [1, 2, 3], 2), sequence(2, [4, 5, 6], 6)
        bench.engine.add(short)
        bench.engine.add(long)
        await bench.until(is_over(short, long))
        # The place of each open token in the step before: `short` ends and `long` moves up.
        assert bench.runner.follows[:4] == [[None, None], [0, 1], [1], [0]]
        assert len(bench.runner.follows) == 6, "a step was computed for nobody"


async def test_a_token_that_ends_its_sequence_is_followed_by_one_discarded_token() -> None:
    async with running(32) as bench:
        tokens = undisturbed([1, 2, 3], 9)
        first = tokens.index(tokens[4])
        one = sequence(1, [1, 2, 3], 9, stop_token_ids=frozenset({tokens[4]}))
        discarded: list[int] = []
        bench.after_step = lambda outcome: discarded.append(outcome.num_discarded)
        bench.engine.add(one)
        await bench.until(is_over(one))
        await bench.until(lambda: sum(discarded) == 1)
        assert one.output_token_ids == tokens[: first + 1]
        assert one.finish_reason is FinishReason.STOP_TOKEN
        assert bench.pool.num_free == 32


async def test_a_failing_step_costs_the_step_behind_it_no_token_of_others() -> None:
    async with running(32) as bench:
        first, second = sequence(1, [1, 2], 8), sequence(2, [3, 4], 8)
        calls: list[int] = []

        def act() -> None:
            if not calls:
                bench.engine.add(second)
            calls.append(1)
            if len(calls) == 3:
                bench.engine.drop(first)
                raise ArithmeticError("NaN")

        bench.on_loop_during_steps(act)
        bench.engine.add(first)
        third = sequence(3, [5, 6], 8)
        await bench.until(lambda: bool(bench.failures))
        bench.engine.add(third)
        await bench.until(is_over(third))
        assert [s.state for s in (first, second)] == [
            SequenceState.DROPPED,
            SequenceState.FAILED,
        ]
        assert third.output_token_ids == undisturbed([5, 6], 8)
        assert bench.pool.num_free == 32


async def test_a_tiny_pool_preempts_and_changes_no_token() -> None:
    async with running(6) as bench:
        bench.after_step = lambda outcome: bench.engine.check()
        batch = [sequence(key, [key + 1] * 5, 14) for key in range(4)]
        for one in batch:
            bench.engine.add(one)
        await bench.until(is_over(*batch))
        assert sum(one.num_preemptions for one in batch) > 0
        for one in batch:
            assert one.output_token_ids == undisturbed(one.prompt_token_ids, 14)


async def test_the_higher_priority_keeps_its_blocks() -> None:
    async with running(6) as bench:
        low, high = sequence(1, [1] * 5, 14, priority=0), sequence(2, [2] * 5, 14, priority=1)
        bench.engine.add(low)
        bench.engine.add(high)
        await bench.until(is_over(low, high))
        assert high.num_preemptions == 0
        assert low.num_preemptions > 0


async def test_a_sequence_longer_than_the_pool_is_refused_with_numbers() -> None:
    async with running(2) as bench:
        with pytest.raises(ValueError, match="9 tokens need 3 blocks of 4 tokens; the pool has 2"):
            bench.engine.add(sequence(1, [1] * 9))


async def test_a_sequence_that_fills_the_pool_ends_with_length() -> None:
    async with running(2) as bench:
        one = sequence(1, [1] * 5, max_new_tokens=100)
        bench.engine.add(one)
        await bench.until(is_over(one))
        assert one.finish_reason is FinishReason.LENGTH
        assert one.output_token_ids == undisturbed([1] * 5, 4)


async def test_drop_during_a_step_discards_the_result_and_frees_after_it() -> None:
    async with running(8) as bench:
        dropped, other = sequence(1, [1, 2, 3], 50), sequence(2, [4, 5, 6], 4)
        seen: list[int] = []

        def act() -> None:
            if dropped.state is SequenceState.RUNNING and bench.engine.num_steps >= 2:
                bench.engine.drop(dropped)
                seen.append(len(dropped.output_token_ids))
                assert all(bench.pool.num_refs(block) for block in dropped.blocks)
                bench.engine.drop(dropped)

        bench.on_loop_during_steps(act)
        bench.engine.add(dropped)
        bench.engine.add(other)
        await bench.until(is_over(other))
        # All blocks: those of the dropped sequence come back with the last step that uses them.
        everything = await asyncio.wait_for(bench.engine.allocate(8), 10)
        assert seen == [len(dropped.output_token_ids)]
        assert dropped.blocks == []
        assert sum(item.sequence is dropped for item in bench.items) == seen[0]
        assert other.output_token_ids == undisturbed([4, 5, 6], 4)
        bench.pool.free(everything)


async def test_a_raising_step_fails_its_sequences_and_the_engine_goes_on() -> None:
    async with running(8) as bench:
        error = ArithmeticError("NaN")

        def broken() -> None:
            bench.runner.during_step = lambda: None
            raise error

        bench.runner.during_step = broken
        failed = [sequence(1, [1, 2]), sequence(2, [3, 4])]
        for one in failed:
            bench.engine.add(one)
        later = sequence(3, [5, 6])
        await bench.engine.allocate(1)  # lets the loop run
        bench.engine.add(later)
        await bench.until(is_over(later))
        assert bench.failures == [(failed, error)]
        assert [one.state for one in failed] == [SequenceState.FAILED] * 2
        assert later.output_token_ids == undisturbed([5, 6], 5)
        assert bench.pool.num_free == 7
        for one in failed:
            bench.engine.drop(one)
        assert bench.pool.num_free == 7


async def test_allocate_waits_in_order_of_priority_then_arrival() -> None:
    async with running(4) as bench:
        held = await bench.engine.allocate(4)
        order: list[str] = []

        async def take(name: str, num_blocks: int, priority: int) -> None:
            blocks = await bench.engine.allocate(num_blocks, priority)
            order.append(name)
            bench.pool.free(blocks)
            bench.engine.wake()

        async with asyncio.TaskGroup() as group:
            for name, num_blocks, priority in (("a", 2, 0), ("b", 4, 0), ("c", 1, 0), ("d", 4, 1)):
                group.create_task(take(name, num_blocks, priority))
            await asyncio.sleep(0)
            assert bench.engine.num_waiting == 4
            bench.pool.free(held)
            bench.engine.wake()
        assert order == ["d", "a", "b", "c"]
        assert bench.pool.num_free == 4
        with pytest.raises(ValueError, match="num_blocks 5: the pool has 4"):
            await bench.engine.allocate(5)


async def test_cancelled_allocate_leaves_no_block_behind() -> None:
    async with running(4) as bench:
        held = await bench.engine.allocate(4)
        first = asyncio.ensure_future(bench.engine.allocate(4))
        second = asyncio.ensure_future(bench.engine.allocate(1))
        await asyncio.sleep(0)
        bench.pool.free(held)
        bench.engine.wake()
        first.cancel()  # after it was served, before it could see that
        with pytest.raises(asyncio.CancelledError):
            await first
        bench.pool.free(await second)
        assert bench.pool.num_free == 4


async def test_fork_shares_full_blocks_and_copies_the_tail() -> None:
    async with running(8) as bench:
        one = sequence(1, [1, 2, 3, 4, 5, 6], 6)
        blocks = await bench.engine.allocate(2)
        bench.runner.cache.slots[blocks[0]] = [1, 2, 3, 4]
        bench.runner.cache.slots[blocks[1]] = [5, -1, -1, -1]
        forked, num_tokens = await bench.engine.fork(blocks, 5)
        assert num_tokens == 5
        assert forked[0] == blocks[0] and forked[1] != blocks[1]
        assert bench.pool.num_refs(blocks[0]) == 2
        other = sequence(2, [1, 2, 3, 4, 5, 9], 6)
        for seq, ids in ((one, blocks), (other, forked)):
            seq.blocks, seq.num_computed = ids, 5
            bench.engine.add(seq)
        await bench.until(is_over(one, other))
        assert one.output_token_ids == undisturbed(one.prompt_token_ids, 6)
        assert other.output_token_ids == undisturbed(other.prompt_token_ids, 6)
        assert bench.pool.num_free == 8
        assert await bench.engine.fork([], 0) == ([], 0)


async def test_a_fork_without_a_free_block_leaves_the_tail_out_and_never_waits() -> None:
    async with running(2) as bench:
        blocks = await bench.engine.allocate(2)
        assert await bench.engine.fork(blocks, 5) == (blocks[:1], 4)
        assert [bench.pool.num_refs(block) for block in blocks] == [2, 1]
        assert await bench.engine.fork(blocks, 4) == (blocks[:1], 4)
        bench.pool.free([*blocks, blocks[0], blocks[0]])
        assert bench.pool.num_free == 2


async def test_cancelled_call_waits_until_the_thread_has_let_go() -> None:
    async with running(2) as bench:
        started, go = concurrent.futures.Future[None](), concurrent.futures.Future[None]()

        def work() -> str:
            started.set_result(None)
            go.result(10)
            return "done"

        call = asyncio.ensure_future(bench.engine.call(work))
        await asyncio.wrap_future(started)
        call.cancel()
        await asyncio.sleep(0)
        assert not call.done()
        go.set_result(None)
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await bench.engine.call(divmod, 7, 2) == (3, 1)


async def test_prefill_ends_after_one_token_per_seed_and_keeps_blocks_on_request() -> None:
    async with running(8, PrefillScheduler(max_batch=4, chunk_tokens=4)) as bench:

        def keep(outcome: StepOutcome) -> None:
            for item in outcome.items:
                item.keep_blocks = True

        bench.after_step = keep
        prompt = list(range(10))
        one = Sequence(1, prompt, (7, 8, 9), SamplingParams(), StoppingParams(max_new_tokens=3))
        bench.engine.add(one)
        await bench.until(is_over(one))
        last = bench.items[-1]
        assert [(i.num_computed_before, i.num_computed_after) for i in bench.items] == [
            (0, 4),
            (4, 8),
            (8, 10),
        ]
        assert last.token_ids == (next_token(prompt),) * 3
        assert last.is_finished and last.finish_reason is None
        assert bench.pool.num_free == 5
        bench.pool.free(one.blocks)


async def test_close_drops_everything_and_refuses_waiters() -> None:
    async with running(4) as bench:
        one = sequence(1, [1] * 8, 100)
        bench.engine.add(one)
        waiting = asyncio.ensure_future(bench.engine.allocate(4))
        await asyncio.sleep(0)
        await bench.engine.close()
        with pytest.raises(EngineClosedError):
            await waiting
        with pytest.raises(EngineClosedError):
            bench.engine.add(sequence(2, [1]))
        assert bench.pool.num_free == 4


OVER = (SequenceState.FINISHED, SequenceState.DROPPED)

operations = st.lists(
    st.tuples(st.sampled_from(["add", "add", "drop", "take", "give"]), st.integers(0, 7)),
    max_size=40,
)


@given(ops=operations, num_blocks=st.integers(6, 12), overlap=st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_adds_drops_and_shortages_change_no_token(
    ops: list[tuple[str, int]], num_blocks: int, overlap: bool
) -> None:
    asyncio.run(_random_life(list(reversed(ops)), num_blocks, overlap))


async def _random_life(ops: list[tuple[str, int]], num_blocks: int, overlap: bool) -> None:
    async with running(num_blocks, DecodeScheduler(max_batch=5, chunk_tokens=6)) as bench:
        live: list[Sequence] = []
        dropped: set[Sequence] = set()
        taken: list[int] = []

        def act() -> None:
            bench.engine.check()
            if not ops:
                bench.pool.free(taken)
                taken.clear()
                bench.engine.wake()
                return
            name, value = ops.pop()
            if name == "add":
                key = len(live)
                live.append(sequence(key, [key % 9 + 1] * (value + 1), value * 2 + 1, value % 2))
                bench.engine.add(live[-1])
            elif name == "drop" and live:
                dropped.add(live[value % len(live)])
                bench.engine.drop(live[value % len(live)])
            elif name == "take" and bench.pool.num_free > 0 and len(taken) < num_blocks - 6:
                taken.extend(bench.pool.allocate(1))
            elif name == "give" and taken:
                bench.pool.free([taken.pop()])
                bench.engine.wake()

        live.append(sequence(0, [1, 2, 3], 12))
        bench.engine.add(live[0])
        if overlap:
            bench.on_loop_during_steps(act)
        else:
            bench.after_step = lambda outcome: act()
        await bench.until(lambda: all(one.state in OVER for one in live))
        ops.clear()
        for one in live:
            wanted = undisturbed(one.prompt_token_ids, one.stopping.max_new_tokens)
            if one.state is SequenceState.FINISHED:
                capacity = num_blocks * BLOCK_TOKENS + 1 - len(one.prompt_token_ids)
                assert one.output_token_ids == wanted[:capacity]
            else:
                assert one in dropped
                assert one.output_token_ids == wanted[: len(one.output_token_ids)]
        bench.pool.free(taken)
        taken.clear()
        bench.engine.check()
