"""The books of blocks: references, quarantine, and waiting for memory."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool, BlockWaiters, PoolExhausted


def test_neighbours_are_handed_out_in_ascending_order_again() -> None:
    pool = BlockPool(8, 4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    pool.free([0, 1, 2])
    assert pool.allocate(3) == [0, 1, 2]
    pool.check()


def test_exhaustion_names_the_numbers_and_takes_nothing() -> None:
    pool = BlockPool(3, 4)
    pool.allocate(1)
    with pytest.raises(PoolExhausted, match="3 blocks asked for, 2 of 3 free"):
        pool.allocate(3)
    assert pool.num_free == 2
    assert pool.allocate(0) == []


def test_a_shared_block_is_free_after_its_last_reference() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.free([block])
    assert pool.num_free == 1
    pool.free([block])
    assert pool.num_free == 2
    with pytest.raises(ValueError, match=f"block {block} has no reference"):
        pool.free([block])
    with pytest.raises(ValueError, match="block 2: the pool has blocks 0 to 1"):
        pool.share([2])


def test_a_refused_share_changes_nothing() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.allocate(1)
    with pytest.raises(ValueError, match="has no reference"):
        pool.share([block, 1 - block])
    assert pool.num_refs(block) == 1


@pytest.mark.parametrize("freed_first", [True, False])
def test_quarantine_bars_reuse_whatever_ends_first(freed_first: bool) -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.quarantine(blocks)
    pool.quarantine(blocks)
    end = [pool.free, pool.unquarantine, pool.unquarantine]
    for step in end if freed_first else reversed(end):
        assert pool.num_free == 1
        step(blocks)
        pool.check()
    assert (pool.num_free, pool.num_quarantined) == (2, 0)
    with pytest.raises(ValueError, match="not in quarantine"):
        pool.unquarantine(blocks)


@given(st.lists(st.tuples(st.sampled_from("asfqu"), st.integers(0, 9)), max_size=60))
@settings(deadline=None)
def test_random_bookings_keep_the_books(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(5, 4)
    references: list[int] = []
    quarantines: list[int] = []
    for name, value in operations:
        if name == "a" and pool.num_free:
            references += pool.allocate(value % pool.num_free + 1)
        elif name == "u" and quarantines:
            pool.unquarantine([quarantines.pop(value % len(quarantines))])
        elif references and name in "sq":
            block = references[value % len(references)]
            (pool.share if name == "s" else pool.quarantine)([block])
            (references if name == "s" else quarantines).append(block)
        elif references and name == "f":
            pool.free([references.pop(value % len(references))])
        pool.check()
        assert pool.num_free == 5 - len({*references, *quarantines})
        assert pool.num_quarantined == len(set(quarantines))


async def test_a_withdrawn_wish_gives_back_what_it_got() -> None:
    pool = BlockPool(3, 4)
    waiters = BlockWaiters(pool)
    served, waiting = waiters.push(2, 0), waiters.push(2, 0)
    waiters.serve(lambda priority: pool.num_free)
    assert (served.done(), waiting.done(), len(waiters)) == (True, False, 1)
    waiters.withdraw(served)
    waiters.withdraw(waiting)
    waiters.serve(lambda priority: pool.num_free)
    assert (pool.num_free, len(waiters)) == (3, 0)
    with pytest.raises(asyncio.CancelledError):
        await waiting
