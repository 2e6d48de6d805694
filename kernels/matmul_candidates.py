"""Configurations of the matrix products that are worth a tuner's time.

Owns the list: what has been among the fastest of some shape on an H100, and what its neighbours
are. Never measures and never chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch

from kernels.matmul_tiles import (
    DECODE_ROWS,
    PREFETCH_BYTES,
    SHARED_BYTES,
    Tiles,
    default_splits,
    default_tiles,
)

_EARLY = (0, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Tiles that differ in what follows `row_bytes` (of block_k); see Tiles."""

    block_n: int
    block_m: int
    num_warps: int = 4
    extra_n: int = 0
    persistent: int = 0
    row_bytes: int = 128
    num_stages: tuple[int, ...]
    num_pieces: tuple[int, ...] = (0,)
    prefetch: tuple[int, ...] = (0,)
    late: tuple[int, ...] = (0,)

    def tiles(self, width: int, dtype: torch.dtype, splits: int) -> Iterator[Tiles]:
        """Those that fit a chip and a weight of width columns."""
        values = asdict(self)
        block_k = values.pop("row_bytes") // dtype.itemsize
        names = ("num_stages", "num_pieces", "prefetch", "late")
        stage_bytes = (self.block_n + self.extra_n + self.block_m) * self.row_bytes
        for some in product(*(values.pop(name) for name in names)):
            tiles = Tiles(
                block_k=block_k, num_splits=splits, **values, **dict(zip(names, some, strict=True))
            )
            # Output passes through shared memory of its own where blocks overlap.
            piece_bytes = 2 * self.block_n * self.block_m // (tiles.num_pieces or 4)
            num_bytes = tiles.num_stages * stage_bytes + self.persistent * piece_bytes
            deep = tiles.num_stages > -(-width // (splits * block_k)) + 1
            asked = tiles.prefetch * PREFETCH_BYTES * splits > width * dtype.itemsize
            if num_bytes <= SHARED_BYTES and not deep and not asked:
                yield tiles


def candidates(num_cols: int, width: int, dtype: torch.dtype, num_rows: int) -> Sequence[Tiles]:
    """Configurations worth timing for num_rows rows (not of block-scaled weights), the default
    first.
    """
    found = {default_tiles(num_cols, width, dtype, num_rows): None}
    splits = default_splits(num_cols, width)
    for family in _families(num_rows, splits):
        found |= dict.fromkeys(family.tiles(width, dtype, splits))
    return tuple(found)


def _families(num_rows: int, splits: int) -> Sequence[_Family]:
    if num_rows > DECODE_ROWS and splits > 1:
        return _MANY_SPLIT
    if num_rows > 1024:
        return _FLAT
    if num_rows > DECODE_ROWS:
        return (*_FLAT, *_UP_TO_1024)
    if num_rows > 128:
        return _UP_TO_256 if splits == 1 else _UP_TO_256_SPLIT
    if num_rows > 64:
        return (
            _Family(block_n=64, block_m=128, num_stages=(3, 6, 8, 9), prefetch=_EARLY),
            _Family(block_n=64, block_m=128, row_bytes=256, num_stages=(4,), prefetch=_EARLY),
            _Family(block_n=64, block_m=64, row_bytes=256, num_stages=(3, 6), prefetch=_EARLY),
        )
    block_m = max(16, num_rows)
    found = [
        _Family(
            block_n=64, block_m=block_m, row_bytes=256, num_stages=(2, 3, 4, 6), prefetch=_EARLY
        ),
        _Family(block_n=64, block_m=block_m, num_stages=(4, 9), prefetch=_EARLY),
    ]
    if num_rows > 32:
        found.append(
            _Family(block_n=64, block_m=32, row_bytes=256, num_stages=(3, 6), prefetch=_EARLY)
        )
    return found


_FLAT = (
    _Family(
        block_n=128, block_m=256, num_warps=8, persistent=1, num_stages=(4,), num_pieces=(2, 4)
    ),
    _Family(
        block_n=128, block_m=128, num_warps=8, persistent=1, num_stages=(6,), num_pieces=(0, 2)
    ),
)
_MANY_SPLIT = (
    _Family(
        block_n=128, block_m=128, num_warps=8, persistent=1, num_stages=(4, 5), num_pieces=(0, 2)
    ),
)
_UP_TO_1024 = (
    _Family(block_n=128, extra_n=64, block_m=256, num_warps=8, num_stages=(4,), num_pieces=(1,)),
    _Family(block_n=128, extra_n=64, block_m=128, num_warps=8, num_stages=(5,), num_pieces=(1,)),
    _Family(
        block_n=128,
        block_m=128,
        num_warps=8,
        num_stages=(6,),
        num_pieces=(0, 1),
        late=(0, 1),
    ),
    _Family(block_n=128, block_m=256, num_warps=8, num_stages=(4,), num_pieces=(1,), late=(0, 1)),
)
_UP_TO_256_SPLIT = (
    _Family(block_n=64, block_m=128, num_stages=(6, 8), prefetch=_EARLY),
    _Family(block_n=128, block_m=128, num_warps=8, num_stages=(6,), prefetch=_EARLY),
)
_UP_TO_256 = (
    _Family(block_n=64, block_m=128, num_stages=(6, 8, 9), num_pieces=(1,), prefetch=_EARLY),
    _Family(block_n=64, block_m=128, row_bytes=256, num_stages=(4,), num_pieces=(1,)),
    _Family(
        block_n=128,
        block_m=128,
        num_stages=(6, 7),
        num_pieces=(1,),
        prefetch=(0, 1, 2),
        late=(0, 1),
    ),
    _Family(block_n=128, block_m=128, num_warps=8, num_stages=(6, 7), late=(0, 1)),
    _Family(block_n=64, block_m=256, num_stages=(5,), num_pieces=(1,), prefetch=_EARLY),
    _Family(
        block_n=128, block_m=256, num_warps=8, num_stages=(4,), num_pieces=(1,), prefetch=_EARLY
    ),
    _Family(
        block_n=128,
        extra_n=64,
        block_m=256,
        num_warps=8,
        num_stages=(4,),
        num_pieces=(1,),
        prefetch=(0, 1, 2),
    ),
)
