"""Tile sizes of the matrix products on a GPU.

Owns which sizes are possible for a weight, which are worth a tuner's time, and what is used where
no table says. The order of summation (num_splits) belongs to the weight's shape and dtype; all
other sizes may follow the number of rows: the tensor core adds k in steps of its instruction (32
bytes) in order, whatever block_k. Never launches anything.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch

from kernels.fp8_quant import FP8, GROUP
from kernels.tiles import TileTables, linear_key

ORDER = ("num_splits",)
"""Values that fix the order of summation: the same for every number of rows of one weight."""

DECODE_ROWS = 256
"""Up to so many rows a product is bound by the weight's bytes, and may stay unreduced."""

ROW_COUNTS = (16, 32, 64, 128, 256, 512, 1024, 4096)
"""Upper ends of the row ranges that have their own tiles; the last one's serve all above."""

# An H100 or H200; what matters is only how full a launch makes the chip.
_NUM_MULTIPROCESSORS = 132
_SHARED_BYTES = 228 * 1024
"""Of a multiprocessor."""
_EXTRA_BYTES = 1024 + 512
"""What the driver and the compiler take for each program."""
_FEW_BLOCKS = 48
_PREFETCH = 2
_HEAD_COLS = 65536
"""A vocabulary: so many blocks that 256 rows at once save a second reading of the weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """One kernel configuration. block_n: weight rows, block_m: tokens, block_k: values of K;
    prefetch: pieces of 512 bytes of each weight row that are asked for before the wait (decode).
    """

    block_n: int
    block_m: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int
    prefetch: int = 0

    @classmethod
    def of(cls, values: Mapping[str, int]) -> Tiles:
        """From a table's values; ValueError names what a Tiles does not have or lacks."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"tiles of a matrix product have no {unknown}")
        if missing := sorted(names - {"prefetch"} - set(values)):
            raise ValueError(f"tiles of a matrix product need {missing}")
        return cls(**values)

    def split_width(self, width: int) -> int:
        """K per split, a multiple of block_k; the last split may reach past width."""
        return -(-width // (self.num_splits * self.block_k)) * self.block_k

    def values(self) -> dict[str, int]:
        """For a table."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulPlan:
    """Tiles of one weight by number of rows: limits ascending, tiles beside them."""

    limits: tuple[int, ...]
    tiles: tuple[Tiles, ...]

    def __post_init__(self) -> None:
        """ValueError where the order of summation would follow the number of rows."""
        orders = {tuple(getattr(tiles, name) for name in ORDER) for tiles in self.tiles}
        if len(orders) != 1:
            raise ValueError(f"{ORDER} must be the same for every number of rows: {orders}")

    def at(self, num_rows: int) -> Tiles:
        """Of the smallest limit that holds num_rows; the last above it."""
        index = bisect.bisect_left(self.limits, num_rows)
        return self.tiles[min(index, len(self.tiles) - 1)]

    def finished(self, num_rows: int) -> Tiles:
        """The same, but always tiles of the kernel that adds the splits itself."""
        return self.at(max(num_rows, DECODE_ROWS + 1))


def make_plan(
    num_cols: int,
    width: int,
    dtype: torch.dtype,
    *,
    block_scaled: bool,
    tables: TileTables | None,
) -> MatmulPlan:
    """Tiles of a weight [num_cols, width] for every number of rows.

    A table's entry is used as it is (ValueError if it is none); block-scaled weights always take
    their own defaults.
    """
    op = "fp8_gemm" if dtype == FP8 else "gemm"
    key = linear_key(num_cols, width)
    found = []
    for limit in ROW_COUNTS:
        values = None if tables is None or block_scaled else tables.at(op, key, limit)
        if values is None:
            found.append(default_tiles(num_cols, width, dtype, limit, block_scaled=block_scaled))
        else:
            found.append(Tiles.of(values))
    return MatmulPlan(limits=ROW_COUNTS, tiles=tuple(found))


def default_splits(num_cols: int, width: int) -> int:
    """1 where the blocks of 64 weight rows alone draw the memory's bandwidth: 64 of them reach 85 %
    of it. Fewer are split, down to 512 of K each.
    """
    splits, num_blocks = 1, -(-num_cols // 64)
    while splits < 8 and num_blocks * splits < _FEW_BLOCKS and width // (2 * splits) >= 512:
        splits *= 2
    return splits


def default_tiles(
    num_cols: int, width: int, dtype: torch.dtype, num_rows: int, *, block_scaled: bool = False
) -> Tiles:
    """What is used without a table."""
    splits = default_splits(num_cols, width)
    if block_scaled:
        return _block_scaled_tiles(splits, num_rows)
    if num_rows > DECODE_ROWS:
        return _prefill_tiles(num_cols, dtype, splits, num_rows)
    return _decode_tiles(num_cols, width, dtype, splits, num_rows)


def _decode_tiles(
    num_cols: int, width: int, dtype: torch.dtype, splits: int, num_rows: int
) -> Tiles:
    """As many bytes in flight as a multiprocessor's shared memory holds, over all its programs."""
    block_k = (256 if num_rows <= 16 else 128) // dtype.itemsize
    block_m = max(16, min(128, num_rows))
    wide = num_rows > 128 and num_cols >= 6144
    if wide and num_cols >= _HEAD_COLS:
        block_m = 256
    block_n = 128 if wide else 64
    num_blocks = -(-num_cols // block_n) * -(-num_rows // block_m) * splits
    together = 1 if wide else min(3, -(-num_blocks // _NUM_MULTIPROCESSORS))
    stage_bytes = (block_n + block_m) * block_k * dtype.itemsize
    steps = -(-width // (splits * block_k))
    deepest = 4 if block_m == 256 else 6 if wide or block_k * dtype.itemsize == 256 else 9
    num_stages = min(deepest, steps, (_SHARED_BYTES // together - _EXTRA_BYTES) // stage_bytes)
    split_bytes = width * dtype.itemsize // splits
    return Tiles(
        block_n=block_n,
        block_m=block_m,
        block_k=block_k,
        num_splits=splits,
        num_warps=8 if wide else 4,
        num_stages=max(2, num_stages),
        prefetch=_PREFETCH if split_bytes % 1024 == 0 and not wide else 0,
    )


def _prefill_tiles(num_cols: int, dtype: torch.dtype, splits: int, num_rows: int) -> Tiles:
    """256 columns where there are blocks enough, and no sum of splits that needs the registers."""
    num_blocks = -(-num_cols // 256) * -(-num_rows // 128)
    wide = splits == 1 and num_blocks >= _NUM_MULTIPROCESSORS
    return Tiles(
        block_n=256 if wide else 128,
        block_m=128,
        block_k=128 // dtype.itemsize,
        num_splits=splits,
        num_warps=8,
        num_stages=3 if wide else 5,
    )


def _block_scaled_tiles(splits: int, num_rows: int) -> Tiles:
    many = num_rows > 64
    return Tiles(
        block_n=128 if many else 64,
        block_m=128 if many else max(16, num_rows),
        block_k=GROUP,
        num_splits=splits,
        num_warps=8 if many else 4,
        num_stages=4,
    )


def candidates(num_cols: int, width: int, dtype: torch.dtype, num_rows: int) -> Sequence[Tiles]:
    """Configurations worth timing for num_rows rows (not of block-scaled weights), the default
    first.
    """
    first = default_tiles(num_cols, width, dtype, num_rows)
    found = {first: None}
    few = num_rows <= DECODE_ROWS
    for splits in _splits(num_cols, width):
        pieces = few and width * dtype.itemsize // splits % 1024 == 0
        for block_n, block_m, row_bytes, num_warps, depths in _shapes(num_rows):
            block_k = row_bytes // dtype.itemsize
            steps = -(-width // (splits * block_k))
            stage_bytes = (block_n + block_m) * row_bytes
            for num_stages in depths:
                if (
                    num_stages > steps + 1
                    or num_stages * stage_bytes > _SHARED_BYTES - _EXTRA_BYTES
                ):
                    continue
                for prefetch in (0, _PREFETCH) if pieces else (0,):
                    tiles = Tiles(
                        block_n=block_n,
                        block_m=block_m,
                        block_k=block_k,
                        num_splits=splits,
                        num_warps=num_warps,
                        num_stages=num_stages,
                        prefetch=prefetch,
                    )
                    found[tiles] = None
    return tuple(found)


# block_n, block_m, bytes of block_k, num_warps, num_stages
_Shape = tuple[int, int, int, int, tuple[int, ...]]
_PREFILL_SHAPES: tuple[_Shape, ...] = (
    (256, 128, 128, 8, (3,)),
    (128, 256, 128, 8, (4,)),
    (128, 128, 128, 8, (4, 5)),
)


def _shapes(num_rows: int) -> Sequence[_Shape]:
    if num_rows > DECODE_ROWS:
        return _PREFILL_SHAPES
    block_m = max(16, min(128, num_rows))
    shapes: list[_Shape] = [(64, block_m, 128, 4, (3, 4, 6, 8, 9))]
    if num_rows <= 64:
        shapes.append((64, block_m, 256, 4, (2, 3, 4, 5, 6)))
    else:
        shapes.append((128, block_m, 128, 8, (3, 4, 6)))
    if num_rows > 128:
        shapes += [(64, 256, 128, 4, (3, 5)), (128, 256, 128, 8, (4,))]
    return shapes


def _splits(num_cols: int, width: int) -> Sequence[int]:
    least = default_splits(num_cols, width)
    more = [2 * least] if num_cols <= 8192 and width // (2 * least) >= 512 else []
    return [least, *more]
