"""Tile sizes of the matrix products on a GPU.

Owns which sizes are possible for a weight, which are worth a tuner's time, and what is used where
no table says. The order of summation (num_splits) belongs to the weight's shape and dtype; all
other sizes may follow the number of rows: the tensor core adds k in steps of its instruction (32
bytes) in order, whatever block_k, and splits end where `SPLIT_STEP` says. Never launches anything.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

import torch

from kernels.fp8_quant import FP8, GROUP
from kernels.tiles import TileTables, linear_key

ORDER = ("num_splits",)
"""Values that fix the order of summation: the same for every number of rows of one weight."""

SPLIT_STEP = 256
"""K of a split is a multiple of it, and every block_k a divisor: block_k may follow the number of
rows, where a split ends may not.
"""

DECODE_ROWS = 256
"""Up to so many rows a product is bound by the weight's bytes, and may stay unreduced."""

ROW_COUNTS = (16, 32, 64, 128, 256, 512, 1024, 4096)
"""Upper ends of the row ranges that have their own tiles; the last one's serve all above."""

SHARED_BYTES = 227 * 1024
"""Of a program on an H100 or H200; a multiprocessor has 1 KiB more, which a program costs."""
PREFETCH = 2
PREFETCH_BYTES = 512
"""Of a piece of a weight row that is asked for early."""

# What matters is only how full a launch makes the chip.
_NUM_MULTIPROCESSORS = 132
_FEW_BLOCKS = 48
_OPTIONAL = {"prefetch", "extra_n", "num_pieces", "late", "persistent"}
"""Tiles that a table need not name: 0 is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """One kernel configuration. block_n: weight rows, block_m: tokens, block_k: values of K.

    persistent: 1 for kernels.matmul_prefill, whose programs go from block to block; 0 for
    kernels.matmul_decode, which alone knows what follows. prefetch: pieces of PREFETCH_BYTES of
    each weight row that are asked for before the wait. extra_n: weight rows of a block in a second
    accumulator. late: 1 lets the next kernel come with the sums' end, not their beginning.
    num_pieces (both): of a finished block, on their way through shared memory to the copy engine;
    0: none take it.
    """

    block_n: int
    block_m: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int
    prefetch: int = 0
    extra_n: int = 0
    num_pieces: int = 0
    late: int = 0
    persistent: int = 0

    @classmethod
    def of(cls, values: Mapping[str, int]) -> Tiles:
        """From a table's values; ValueError names what a Tiles does not have or lacks."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"tiles of a matrix product have no {unknown}")
        if missing := sorted(names - _OPTIONAL - set(values)):
            raise ValueError(f"tiles of a matrix product need {missing}")
        return cls(**values)

    def __post_init__(self) -> None:
        """ValueError where splits would end at another k than with other sizes, or one kernel were
        asked for what only the other does.
        """
        if self.block_k < 1 or SPLIT_STEP % self.block_k:
            raise ValueError(f"block_k {self.block_k} of a matrix product: no part of {SPLIT_STEP}")
        if self.extra_n and (self.num_splits > 1 or self.persistent):
            raise ValueError(f"extra_n {self.extra_n}: for one split and no persistent programs")

    def split_width(self, width: int) -> int:
        """K per split, the same for every block_k; the last splits may reach past width."""
        return -(-width // (self.num_splits * SPLIT_STEP)) * SPLIT_STEP

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
        """The same for a kernel that adds the splits itself, which is the persistent one."""
        tiles = self.at(max(num_rows, DECODE_ROWS + 1))
        return tiles if tiles.num_splits == 1 else replace(tiles, persistent=1)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block's shape that has proved itself, at 128 bytes of K; see Tiles."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    extra_n: int = 0
    num_pieces: int = 1
    prefetch: int = 0
    late: int = 0
    persistent: int = 0

    def tiles(self, width: int, dtype: torch.dtype, splits: int) -> Tiles:
        """Of a weight of width columns."""
        block_k = 128 // dtype.itemsize
        values = asdict(self) | {"num_stages": min(self.num_stages, -(-width // block_k) + 1)}
        if width * dtype.itemsize // splits < self.prefetch * PREFETCH_BYTES:
            values["prefetch"] = 0
        return Tiles(block_k=block_k, num_splits=splits, **values)

    def cost(self, num_cols: int, num_rows: int) -> int:
        """Values of the result that a multiprocessor computes, one block after the other."""
        block_n = self.block_n + self.extra_n
        num_blocks = -(-num_cols // block_n) * -(-num_rows // self.block_m)
        return -(-num_blocks // _NUM_MULTIPROCESSORS) * block_n * self.block_m


# Of equal cost the first is the fastest.
_UP_TO_256_ROWS = (
    Block(block_n=128, extra_n=64, block_m=256, num_warps=8, num_stages=4, prefetch=PREFETCH),
    Block(block_n=128, block_m=256, num_warps=8, num_stages=4, prefetch=PREFETCH),
    Block(block_n=128, block_m=128, num_warps=4, num_stages=6, prefetch=1, late=1),
    Block(block_n=64, block_m=128, num_warps=4, num_stages=8, prefetch=PREFETCH),
)
_FLAT = (
    Block(block_n=128, block_m=256, num_warps=8, num_stages=4, num_pieces=4, persistent=1),
    Block(block_n=128, block_m=128, num_warps=8, num_stages=6, num_pieces=2, persistent=1),
)
# Above, every shape fills a chip, and blocks of persistent programs overlap.
_UP_TO_1024_ROWS = (
    _FLAT[0],
    Block(block_n=128, extra_n=64, block_m=256, num_warps=8, num_stages=4),
    Block(block_n=128, extra_n=64, block_m=128, num_warps=8, num_stages=5),
    _FLAT[1],
)
_SPLIT = Block(block_n=128, block_m=128, num_warps=8, num_stages=5, num_pieces=2, persistent=1)


def default_tiles(
    num_cols: int, width: int, dtype: torch.dtype, num_rows: int, *, block_scaled: bool = False
) -> Tiles:
    """What is used without a table."""
    splits = default_splits(num_cols, width)
    if block_scaled:
        return _block_scaled_tiles(splits, num_rows)
    if num_rows <= DECODE_ROWS // 2 or (num_rows <= DECODE_ROWS and splits > 1):
        return _decode_tiles(num_cols, width, dtype, splits, num_rows)
    if splits > 1:
        return _SPLIT.tiles(width, dtype, splits)
    if num_rows > 1024:
        return _FLAT[0].tiles(width, dtype, splits)
    blocks = _UP_TO_256_ROWS if num_rows <= DECODE_ROWS else _UP_TO_1024_ROWS
    best = min(blocks, key=lambda block: block.cost(num_cols, num_rows))
    return best.tiles(width, dtype, splits)


def _decode_tiles(
    num_cols: int, width: int, dtype: torch.dtype, splits: int, num_rows: int
) -> Tiles:
    """As many bytes in flight as a multiprocessor's shared memory holds, over all its programs."""
    block_k = (256 if num_rows <= 64 else 128) // dtype.itemsize
    block_m = max(16, min(128, num_rows))
    num_blocks = -(-num_cols // 64) * -(-num_rows // block_m) * splits
    together = min(3, -(-num_blocks // _NUM_MULTIPROCESSORS))
    stage_bytes = (64 + block_m) * block_k * dtype.itemsize
    steps = -(-width // (splits * block_k))
    deepest = 6 if block_k * dtype.itemsize == 256 else 9
    num_stages = min(deepest, steps, SHARED_BYTES // together // stage_bytes)
    return Tiles(
        block_n=64,
        block_m=block_m,
        block_k=block_k,
        num_splits=splits,
        num_warps=4,
        num_stages=max(2, num_stages),
        prefetch=PREFETCH if width * dtype.itemsize // splits % 1024 == 0 else 0,
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
        persistent=1 if num_rows > DECODE_ROWS else 0,
    )
