"""Operations as the tuner sees them: candidates, random inputs, a run, a reference.

Owns which configurations are worth timing where an operation's own module does not say. Never
times and never chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from kernels.attention_plan import DecodePlan, DecodeWorkspace, decode_plan, max_decode_splits
from kernels.fp8_quant import Fp8Rows
from kernels.kv_pages import KvPages
from kernels.paged_decode import DecodeConfig, paged_decode, read_pages
from kernels.rmsnorm import add_rmsnorm, default_warps
from kernels.tile_format import Values
from kernels.tile_search import Tunable
from kernels.timing import COLD_NUM_BYTES, num_sets
from kernels.tunable_matmul import Matmul

_DEVICE, _DTYPE = "cuda", torch.bfloat16
_BLOCK_TOKENS = 64
_EPS = 1e-6


class _PlainOp:
    """What operations share that return one finished tensor."""

    order: tuple[str, ...] = ()
    # bf16 results of bf16 or FP8 operands against float32.
    limit = 1e-2

    def __init__(self, op: str, key: str) -> None:
        self.op = op
        self.key = key
        # One seed for all processes of a search, and nothing global.
        self.random = torch.Generator(_DEVICE).manual_seed(0)

    def run(self, tiles: Values, inputs: Any) -> Any:
        raise AssertionError(f"{self.op} does not say how it runs")

    def timed(self, tiles: Values, inputs: Any) -> None:
        self.run(tiles, inputs)

    def result(self, out: Any) -> torch.Tensor:
        return out

    def written(self, out: Any) -> Sequence[torch.Tensor]:
        return [out]

    def normal(self, *shape: int) -> torch.Tensor:
        """Random bf16 values of unit variance."""
        return torch.randn(*shape, generator=self.random, device=_DEVICE, dtype=_DTYPE)


class _RmsNorm(_PlainOp):
    """add + RMSNorm + FP8 quantisation over rows of `width`: key "4096"."""

    # The result is FP8: three bits of mantissa.
    limit = 4e-2

    def __init__(self, key: str, max_rows: int) -> None:
        super().__init__("rmsnorm", key)
        self.width = int(key)
        self.weight = self.normal(self.width)
        self.rows = (self.normal(max_rows, self.width), self.normal(max_rows, self.width))

    def candidates(self, num_rows: int) -> Sequence[Values]:
        first = default_warps(self.width, num_rows)
        others = [warps for warps in (1, 2, 4, 8, 16, 32) if warps != first]
        return [{"num_warps": warps} for warps in (first, *others)]

    def inputs(self, num_rows: int, *, cold: bool) -> Sequence[Any]:
        x, residual = self.rows[0][:num_rows], self.rows[1][:num_rows]
        # x and residual are read, their sum and an FP8 result written.
        copies = num_sets(7 * x.numel()) if cold else 1
        return [(x.clone(), residual.clone()) for _ in range(copies)]

    def run(self, tiles: Values, inputs: Any) -> Any:
        x, residual = inputs
        options = {"quantise": "token", "warps": tiles["num_warps"], "pdl": True}
        return add_rmsnorm(x, residual, self.weight, _EPS, **options)

    def result(self, out: tuple[Fp8Rows, torch.Tensor]) -> torch.Tensor:
        normed, total = out
        return torch.cat([normed.dequantise(torch.float32), total.float()], dim=1)

    def written(self, out: tuple[Fp8Rows, torch.Tensor]) -> Sequence[torch.Tensor]:
        normed, total = out
        return [normed.values, normed.scales, total]

    def reference(self, inputs: Any) -> torch.Tensor:
        total = (inputs[0] + inputs[1]).float()
        scale = total.square().mean(-1, keepdim=True).add_(_EPS).rsqrt_()
        return torch.cat([total * scale * self.weight.float(), total], dim=1)


class _PagedDecode(_PlainOp):
    """One token a row over up to 4096 tokens of context, as many as 256 ki tokens allow.

    Key "32x8x128": query heads, KV heads, head dimension; bf16 pages.
    """

    order: tuple[str, ...] = ("num_warps",)

    def __init__(self, key: str, max_rows: int) -> None:
        super().__init__("paged_decode", key)
        self.num_heads, self.num_kv_heads, self.head_dim = map(int, key.split("x"))
        self.scale = self.head_dim**-0.5
        self.context = min(4096, max(_BLOCK_TOKENS, 2**18 // max_rows))
        row_bytes = self.context * self.num_kv_heads * self.head_dim * 4
        self.num_rows = max(max_rows, -(-COLD_NUM_BYTES // row_bytes))
        self.blocks_per_row = self.context // _BLOCK_TOKENS
        num_blocks = self.num_rows * self.blocks_per_row
        shape = (self.num_kv_heads, 1, 2, _BLOCK_TOKENS, self.head_dim)
        self.pages = KvPages(values=self.normal(num_blocks, *shape))
        order = torch.randperm(num_blocks, generator=self.random, device=_DEVICE)
        self.table = order.view(self.num_rows, self.blocks_per_row).int()
        self.query = self.normal(self.num_rows, self.num_heads, self.head_dim)

    def candidates(self, num_rows: int) -> Sequence[Values]:
        default = DecodeConfig()
        first = (default.num_warps, default.num_stages, default.programs_per_sm)
        grid = dict.fromkeys([first, *product((2, 4, 8), (2, 3, 4, 5), (1, 2, 3, 4))])
        names = ("num_warps", "num_stages", "programs_per_sm")
        return [dict(zip(names, values, strict=True)) for values in grid]

    def inputs(self, num_rows: int, *, cold: bool) -> Sequence[Any]:
        starts = range(0, self.num_rows - num_rows + 1 if cold else 1, num_rows)
        return [self._set(slice(start, start + num_rows)) for start in starts]

    def _set(self, rows: slice) -> tuple[torch.Tensor, DecodePlan]:
        num_rows = rows.stop - rows.start
        splits = max_decode_splits(num_rows, self.table.numel(), self.blocks_per_row, _BLOCK_TOKENS)
        workspace = DecodeWorkspace.allocate(
            max_rows=num_rows,
            max_splits=splits,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_tokens=_BLOCK_TOKENS,
            device=_DEVICE,
        )
        lengths = torch.full((num_rows,), self.context, dtype=torch.int32, device=_DEVICE)
        plan = decode_plan(self.table[rows].contiguous(), lengths, workspace)
        return self.query[rows].clone(), plan

    def run(self, tiles: Values, inputs: Any) -> Any:
        query, plan = inputs
        config = DecodeConfig(**tiles)
        return paged_decode(query, self.pages, 0, plan, self.scale, pdl=True, config=config)

    def reference(self, inputs: Any) -> torch.Tensor:
        query, plan = inputs
        rows = []
        for row, blocks in zip(query, plan.block_table.long(), strict=True):
            key, value = read_pages(self.pages, 0, blocks, self.context)
            heads = row.float().unflatten(0, (self.num_kv_heads, -1))
            weights = torch.softmax(heads @ key.transpose(1, 2) * self.scale, dim=-1)
            rows.append((weights @ value).view(1, -1))
        return torch.cat(rows)


_CLASSES: Mapping[str, Callable[[str, int], Tunable]] = {
    "fp8_gemm": partial(Matmul, "fp8_gemm"),
    "gemm": partial(Matmul, "gemm"),
    "paged_decode": _PagedDecode,
    "rmsnorm": _RmsNorm,
}
OPS = tuple(_CLASSES)
"""Every operation that has tiles to tune."""


def make_tunable(op: str, key: str, max_rows: int) -> Tunable:
    """The Tunable of one of OPS at a shape, for up to max_rows rows, on the current GPU."""
    return _CLASSES[op](key, max_rows)
