"""Cases of what follows the q|k|v projection, and of the block digest.

Owns their inputs, the bytes they must move and their checks. Never times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.row_cases import BF16_LIMIT, EPS, PDL_ROWS, Call, Case, normal, product_of
from benchmarks.gpu.timing import require_close
from kernels.block_digest import _launch_triton as _launch_digest
from kernels.block_digest import block_digest
from kernels.fp8_quant import FP8
from kernels.fused_qkv import qkv_finish
from kernels.kv_pages import KvPages
from kernels.kv_write import kv_write
from kernels.rmsnorm import _rmsnorm_torch, rmsnorm
from kernels.rope import rope, rope_tables

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
BLOCK_TOKENS, NUM_BLOCKS, CONTEXT_LEN = 64, 512, 8192
BLOCK_NUM_BYTES = 9 * 2**20


class QkvSetting:
    """Tables, norms and pages of two layers that every qkv case shares."""

    def __init__(self) -> None:
        inv_freq = 1e6 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
        self.tables = rope_tables(inv_freq, CONTEXT_LEN, torch.bfloat16)
        self.norms = normal(HEAD_DIM), normal(HEAD_DIM)
        self.heads_norm = torch.stack(
            [self.norms[0]] * NUM_HEADS + [self.norms[1]] * NUM_KV_HEADS
        )  # [num_heads + num_kv_heads, head_dim]
        shape = (NUM_KV_HEADS, 2, 2, BLOCK_TOKENS, HEAD_DIM)
        size = NUM_BLOCKS * NUM_KV_HEADS * 4 * BLOCK_TOKENS
        self.bf16, self.fp8 = (
            KvPages.of(torch.zeros(size * width, dtype=torch.uint8, device="cuda"), shape, dtype)
            for width, dtype in ((2 * HEAD_DIM, torch.bfloat16), (HEAD_DIM + 4, FP8))
        )

    def places(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random (positions, block_ids, offsets); no slot twice."""
        slots = torch.randperm(NUM_BLOCKS * BLOCK_TOKENS, device="cuda")[:rows]
        positions = torch.randint(CONTEXT_LEN, (rows,), device="cuda")
        return positions, slots // BLOCK_TOKENS, slots % BLOCK_TOKENS

    def fused(self, qkv: Any, where: Any, pages: KvPages, *, pdl: bool) -> torch.Tensor:
        """One kernel."""
        return qkv_finish(
            qkv, q_norm=self.norms[0], k_norm=self.norms[1], eps=EPS, cos=self.tables[0],
            sin=self.tables[1], positions=where[0], block_ids=where[1], offsets=where[2],
            pages=pages, layer=1, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, pdl=pdl,
        )  # fmt: skip

    def separate(self, qkv: torch.Tensor, where: Any, norm: Callable[..., Any]) -> torch.Tensor:
        """norm, rope and copy one after the other."""
        heads = qkv.view(qkv.shape[0], -1, HEAD_DIM)
        qk = norm(heads[:, :-NUM_KV_HEADS], self.heads_norm, EPS)
        cos, sin = (table[where[0]][:, None] for table in self.tables)
        qk = rope(qk, cos, sin)
        value = heads[:, -NUM_KV_HEADS:]
        kv_write(self.bf16.values, 1, qk[:, NUM_HEADS:], value, where[1], where[2])
        return qk[:, :NUM_HEADS]


def qkv_cases() -> Iterator[Case]:
    """q/k norm + rope + KV write: fused, and as separate kernels (ours, torch)."""
    setting = QkvSetting()

    def torch_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, (HEAD_DIM,), None, eps) * weight

    ours = functools.partial(setting.separate, norm=rmsnorm)
    theirs = functools.partial(setting.separate, norm=torch_norm)
    for rows in (1, 16, 64, 256, 8192):
        pdl = rows <= PDL_ROWS
        fused = functools.partial(setting.fused, pages=setting.bf16, pdl=pdl)
        fp8 = functools.partial(setting.fused, pages=setting.fp8, pdl=pdl)
        yield _qkv_case(setting, "qkv fused", rows, fused)
        if rows <= 64:
            for splits in (2, 4):
                name = f"product of {splits}+qkv fused, in L2"
                yield _qkv_case(setting, name, rows, fused, splits=splits)
        yield _qkv_case(setting, "qkv fused, fp8 kv", rows, fp8, kv_bytes=1)
        yield _qkv_case(setting, "qkv our norm, torch rope + copy", rows, ours)
        yield _qkv_case(setting, "qkv torch", rows, theirs)


def _qkv_case(
    setting: QkvSetting,
    name: str,
    rows: int,
    run: Callable[..., Any],
    *,
    splits: int = 0,
    kv_bytes: int = 2,
) -> Case:
    def make() -> Call:
        qkv = product_of(rows, QKV, splits) if splits else normal(rows, QKV)
        return functools.partial(run, qkv, setting.places(rows))

    def check() -> None:
        qkv, where = normal(rows, QKV), setting.places(rows)
        expected = setting.separate(qkv, where, _rmsnorm_torch)
        require_close("qkv", run(qkv, where), expected, BF16_LIMIT)

    read, written = QKV * (4 * splits or 2), 2 * NUM_KV_HEADS * HEAD_DIM * kv_bytes
    num_bytes = rows * (read + written + 2 * NUM_HEADS * HEAD_DIM)
    return Case(name=name, rows=rows, num_bytes=num_bytes, make=make, check=check, warm=splits > 0)


def digest_cases() -> Iterator[Case]:
    """16 blocks of 9 MiB out of an arena, by ids on the device, without the copy to the host."""

    def make() -> Call:
        arena = torch.randint(0, 256, (32, BLOCK_NUM_BYTES), dtype=torch.uint8, device="cuda")
        words, ids = arena.view(torch.int64), torch.randperm(32, device="cuda")[:16]
        return functools.partial(_launch_digest, words, ids)

    def check() -> None:
        arena = torch.randint(0, 256, (2, BLOCK_NUM_BYTES), dtype=torch.uint8, device="cuda")
        if block_digest(arena, [1, 0]) != block_digest(arena.cpu(), [1, 0]):
            raise ValueError("digest: differs from the twin")

    num_bytes = 16 * BLOCK_NUM_BYTES
    yield Case(name="digest, 9 MiB blocks", rows=16, num_bytes=num_bytes, make=make, check=check)
