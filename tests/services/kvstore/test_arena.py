"""Slots: no overlap, contiguous runs, slabs that change size when empty."""

from __future__ import annotations

import mmap
import random

import pytest

from services.kvstore.arena import DramArena, SlotAllocator


def test_arena_is_page_aligned_and_zero() -> None:
    arena = DramArena(10_000)
    assert arena.address % mmap.PAGESIZE == 0
    assert arena.memory.shape == (10_000,) and not arena.memory.any()
    arena.memory[-1] = 7
    arena.close()


def test_arena_refuses_no_bytes() -> None:
    with pytest.raises(ValueError, match="arena of 0 bytes"):
        DramArena(0)


def test_fresh_slots_are_adjacent() -> None:
    slots = SlotAllocator(1 << 20)
    offsets = [slots.allocate(4096) for _ in range(256)]
    assert offsets == list(range(0, 1 << 20, 4096))
    assert slots.allocate(4096) is None
    assert slots.capacity == 256


def test_a_block_as_large_as_the_arena_fits() -> None:
    slots = SlotAllocator(1 << 20)
    assert slots.allocate(1 << 20) == 0
    assert slots.allocate(64) is None


def test_an_empty_slab_serves_another_size() -> None:
    slots = SlotAllocator(1 << 16)
    small = [slots.allocate(4096) for _ in range(16)]
    assert slots.allocate(8192) is None
    for offset in small[:2]:
        assert offset is not None
        slots.free(offset)
    assert slots.allocate(8192) == 0
    slots.check()


def test_could_fit_joins_neighbours_and_sees_pinned_slots() -> None:
    slots = SlotAllocator(1 << 16)
    for _ in range(16):
        slots.allocate(4096)
    assert slots.could_fit(1 << 16, lambda offset: True)
    assert not slots.could_fit(1 << 16, lambda offset: offset != 4096)
    assert slots.could_fit(1 << 15, lambda offset: offset != 4096)
    assert not slots.could_fit(4096, lambda offset: False)


@pytest.mark.parametrize("seed", range(5))
def test_random_sizes_never_overlap(seed: int) -> None:
    rng = random.Random(seed)
    slots = SlotAllocator(1_000_003)
    live: dict[int, int] = {}
    for _ in range(2000):
        if live and rng.random() < 0.5:
            offset = rng.choice(list(live))
            slots.free(offset)
            del live[offset]
        else:
            num_bytes = rng.choice([100, 4096, 30_000, 250_000])
            fresh = slots.allocate(num_bytes)
            if fresh is not None:
                assert all(
                    fresh + num_bytes <= other or other + length <= fresh
                    for other, length in live.items()
                )
                assert fresh + num_bytes <= slots.num_bytes
                live[fresh] = num_bytes
        slots.check()
    for offset in live:
        slots.free(offset)
    assert slots.allocate(1_000_000) == 0
