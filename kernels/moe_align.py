"""Tokens sorted by expert, each expert's padded to whole tiles: what a grouped product walks.

Owns the contract of vLLM's moe_align_block_size, the one import of it and the choice between it and
our own kernel. The order of an expert's tokens is free in that contract; ours is ascending. Never
looks at weights.
"""

# Triton types its language for the compiler, not for a checker.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

ALIGN_SOURCES = ("auto", "kvmesh", "vllm")
"""auto: vLLM's where it can be imported, else ours."""

_MODULES = (
    "vllm.model_executor.layers.fused_moe.moe_align_block_size",
    "vllm.model_executor.layers.fused_moe.fused_moe",
)
_CHUNK = 1024
_FILL = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """Pairs of (token, rank among its experts), by number token * top_k + rank, in tiles.

    pairs [capacity] int32: sorted by expert, padded with num_pairs; tile_experts [capacity /
    tile_size] int32: the expert of every tile; num_padded [1] int32: entries of pairs that count.
    What lies behind num_padded has no meaning.
    """

    pairs: torch.Tensor
    tile_experts: torch.Tensor
    num_padded: torch.Tensor
    tile_size: int

    @property
    def max_tiles(self) -> int:
        """Tiles that there can be."""
        return self.tile_experts.shape[0]


Align = Callable[[torch.Tensor, int, int], Aligned]
"""moe_align, or what stands in for it."""


def moe_align(expert_ids: torch.Tensor, tile_size: int, num_experts: int) -> Aligned:
    """expert_ids [num_tokens, top_k] int32, each below num_experts; tile_size: a power of two."""
    launch = _launch_triton if expert_ids.is_cuda else _align_torch
    return launch(expert_ids, tile_size, num_experts)


def alignment(source: str) -> Align:
    """What aligns on a GPU: one of ALIGN_SOURCES.

    ValueError for another name, and for "vllm" where vLLM cannot be imported.
    """
    if source not in ALIGN_SOURCES:
        raise ValueError(f"moe_align: {source!r}; one of {list(ALIGN_SOURCES)}")
    if source == "kvmesh":
        return moe_align
    for name in _MODULES:
        try:
            return _adapted(importlib.import_module(name).moe_align_block_size)
        except (ImportError, AttributeError):
            continue
    if source == "vllm":
        raise ValueError("moe_align: vllm; vLLM cannot be imported")
    return moe_align


def _adapted(theirs: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Align:
    """vLLM's function as an Align."""

    def align(expert_ids: torch.Tensor, tile_size: int, num_experts: int) -> Aligned:
        pairs, tile_experts, num_padded = theirs(expert_ids, tile_size, num_experts)
        return Aligned(
            pairs=pairs, tile_experts=tile_experts, num_padded=num_padded, tile_size=tile_size
        )

    return align


def _capacity(num_pairs: int, tile_size: int, num_experts: int) -> int:
    """Entries that padding can take at most, in whole tiles."""
    most = num_pairs + min(num_experts, num_pairs) * (tile_size - 1)
    return max(1, -(-most // tile_size)) * tile_size


def _align_torch(expert_ids: torch.Tensor, tile_size: int, num_experts: int) -> Aligned:
    flat, num_pairs = expert_ids.flatten().long(), expert_ids.numel()
    counts = torch.bincount(flat, minlength=num_experts)
    padded = (counts + tile_size - 1) // tile_size * tile_size
    ends = padded.cumsum(0)
    pairs = torch.full((_capacity(num_pairs, tile_size, num_experts),), num_pairs)
    order = torch.argsort(flat, stable=True)
    places = torch.arange(num_pairs) - (counts.cumsum(0) - counts)[flat[order]]
    pairs[(ends - padded)[flat[order]] + places] = order
    starts = torch.arange(pairs.shape[0] // tile_size) * tile_size
    experts = torch.searchsorted(ends, starts, right=True).clamp_max(num_experts - 1)
    return Aligned(
        pairs=pairs.int(),
        tile_experts=experts.int(),
        num_padded=ends[-1:].int(),
        tile_size=tile_size,
    )


@triton.jit
def _align_kernel(
    expert_ptr,
    pairs_ptr,
    tile_expert_ptr,
    num_padded_ptr,
    num_pairs,
    capacity,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    FILL: tl.constexpr,
):
    """Program e places expert e's pairs; those from NUM_EXPERTS on fill what is behind the last."""
    program = tl.program_id(0)
    bins, places = tl.arange(0, BINS), tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, num_pairs, CHUNK):
        index = start + places
        experts = tl.load(expert_ptr + index, mask=index < num_pairs, other=NUM_EXPERTS)
        counts += tl.histogram(experts, BINS)
    padded = tl.where(bins < NUM_EXPERTS, (counts + TILE - 1) // TILE * TILE, 0)
    total = tl.sum(padded)
    if program >= NUM_EXPERTS:
        index = (program - NUM_EXPERTS) * FILL + tl.arange(0, FILL)
        tl.store(pairs_ptr + index, num_pairs, mask=(index >= total) & (index < capacity))
        tl.store(num_padded_ptr, total, mask=program == NUM_EXPERTS)
    else:
        first = tl.sum(tl.where(bins < program, padded, 0))
        behind = first + tl.sum(tl.where(bins == program, padded, 0))
        place = first
        for start in range(0, num_pairs, CHUNK):
            index = start + places
            mine = tl.load(expert_ptr + index, mask=index < num_pairs, other=-1) == program
            before = tl.cumsum(mine.to(tl.int32), axis=0) - 1
            tl.store(pairs_ptr + place + before, index, mask=mine)
            place += tl.sum(mine.to(tl.int32))
        pad = place + tl.arange(0, TILE)
        tl.store(pairs_ptr + pad, num_pairs, mask=pad < behind)
        for start in range(first, behind, TILE):
            tl.store(tile_expert_ptr + start // TILE, program)


def _launch_triton(expert_ids: torch.Tensor, tile_size: int, num_experts: int) -> Aligned:
    num_pairs, device = expert_ids.numel(), expert_ids.device
    capacity = _capacity(num_pairs, tile_size, num_experts)
    pairs = torch.empty(capacity, dtype=torch.int32, device=device)
    tile_experts = torch.empty(capacity // tile_size, dtype=torch.int32, device=device)
    num_padded = torch.empty(1, dtype=torch.int32, device=device)
    kernel: Any = _align_kernel
    kernel[(num_experts + triton.cdiv(capacity, _FILL),)](
        expert_ids,
        pairs,
        tile_experts,
        num_padded,
        num_pairs,
        capacity,
        NUM_EXPERTS=num_experts,
        BINS=triton.next_power_of_2(num_experts + 1),
        TILE=tile_size,
        CHUNK=min(_CHUNK, triton.next_power_of_2(max(num_pairs, 32))),
        FILL=_FILL,
        num_warps=4,
    )
    return Aligned(
        pairs=pairs, tile_experts=tile_experts, num_padded=num_padded, tile_size=tile_size
    )
