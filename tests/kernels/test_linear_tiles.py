"""Tile sizes of the matrix products: one order of summation a weight, and what fits a chip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.fp8_quant import FP8
from kernels.matmul_candidates import candidates
from kernels.matmul_tiles import (
    DECODE_ROWS,
    PREFETCH_BYTES,
    ROW_COUNTS,
    SHARED_BYTES,
    MatmulPlan,
    Tiles,
    default_splits,
    default_tiles,
    make_plan,
)
from kernels.tile_format import TUNED, Entry, check_values
from kernels.tiles import TileTables

# Qwen3-8B's and Qwen2.5-0.5B's products, a head, and one with odd sizes.
SHAPES = ((24576, 4096), (4096, 12288), (6144, 4096), (896, 4864), (151936, 4096), (1000, 1200))
DTYPES = (FP8, torch.bfloat16)

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@shapes
@dtypes
def test_the_default_is_the_first_candidate_and_all_fit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for num_rows in ROW_COUNTS:
        found = candidates(*shape, dtype, num_rows)
        assert found[0] == default_tiles(*shape, dtype, num_rows)
        for tiles in found:
            check_values("tiles", tiles.values())
            num_bytes = (
                (tiles.block_n + tiles.extra_n + tiles.block_m)
                * tiles.block_k
                * dtype.itemsize
                * tiles.num_stages
            )
            assert num_bytes <= SHARED_BYTES, tiles


@shapes
@dtypes
def test_nothing_is_prefetched_behind_a_rows_share_of_a_split(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for num_rows in ROW_COUNTS:
        for tiles in candidates(*shape, dtype, num_rows):
            asked = tiles.prefetch * PREFETCH_BYTES * tiles.num_splits
            assert asked <= shape[1] * dtype.itemsize, tiles


@shapes
@dtypes
@pytest.mark.parametrize("block_scaled", [False, True])
def test_a_weight_has_one_order_of_summation(
    shape: tuple[int, int], dtype: torch.dtype, block_scaled: bool
) -> None:
    plan = make_plan(*shape, dtype, block_scaled=block_scaled, tables=None)
    splits = default_splits(*shape)
    used = [plan.at(n) for n in (1, 16, 17, 256, 257, 5000)]
    used += [plan.finished(n) for n in (1, 300)]
    assert {tiles.num_splits for tiles in used} == {splits}
    assert len({tiles.split_width(shape[1]) for tiles in used}) == 1


def test_splits_end_at_the_same_k_whatever_block_k() -> None:
    one, other = default_tiles(1000, 1200, FP8, 16), default_tiles(1000, 1200, FP8, 300)
    assert one.num_splits > 1 and one.block_k != other.block_k
    assert one.split_width(1200) == other.split_width(1200)
    with pytest.raises(ValueError, match="block_k 96"):
        replace(one, block_k=96)


def test_splits_fill_a_chip_that_few_blocks_do_not() -> None:
    assert default_splits(4096, 4096) == 1
    assert default_splits(1024, 4096) > 1
    assert default_splits(1024, 512) == 1  # too short to cut


def test_a_second_accumulator_is_for_programs_of_one_block_and_one_split() -> None:
    tiles = next(t for t in candidates(24576, 4096, FP8, 256) if t.extra_n)
    with pytest.raises(ValueError, match="extra_n 64"):
        replace(tiles, num_splits=2)
    with pytest.raises(ValueError, match="extra_n 64"):
        replace(tiles, persistent=1)


@shapes
@dtypes
def test_splits_that_must_be_added_find_the_kernel_that_adds_them(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    plan = make_plan(*shape, dtype, block_scaled=False, tables=None)
    for num_rows in (1, 256, 257, 5000):
        tiles = plan.finished(num_rows)
        assert tiles.persistent or tiles.num_splits == 1


def test_tiles_of_other_splits_cannot_stand_in_one_plan() -> None:
    one = default_tiles(1024, 4096, FP8, 16)
    other = default_tiles(4096, 4096, FP8, 16)
    with pytest.raises(ValueError, match="num_splits"):
        MatmulPlan(limits=(16, 32), tiles=(one, other))


def test_rows_find_the_smallest_range_that_holds_them() -> None:
    plan = make_plan(4096, 4096, FP8, block_scaled=False, tables=None)
    assert plan.at(1) == plan.at(16) == plan.tiles[0]
    assert plan.at(17) == plan.tiles[1]
    assert plan.at(10**6) == plan.tiles[-1]
    assert plan.finished(1) == plan.at(DECODE_ROWS + 1)


def test_a_tables_entry_is_used_and_a_wrong_one_named() -> None:
    tiles = {"block_n": 64, "block_m": 16, "block_k": 128, "num_warps": 4, "num_stages": 3}
    entry = Entry(source=TUNED, order={"num_splits": 2}, rows=((16, tiles),), about={})
    tables = TileTables(entries={"fp8_gemm/4096x4096": entry})
    plan = make_plan(4096, 4096, FP8, block_scaled=False, tables=tables)
    assert plan.at(1) == Tiles(**tiles, num_splits=2)
    assert make_plan(4096, 4096, torch.bfloat16, block_scaled=False, tables=tables) != plan
    with pytest.raises(ValueError, match=r"no \['num_ctas'\]"):
        Tiles.of({**tiles, "num_splits": 2, "num_ctas": 2})
    with pytest.raises(ValueError, match=r"need \['num_splits'\]"):
        Tiles.of(tiles)
