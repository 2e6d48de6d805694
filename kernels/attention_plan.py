"""What attention over paged KV looks at in a step, made once and shared by all layers.

Owns the work lists of decode (built on the device, so that a CUDA graph holds for any lengths) and
of prefill (built on the host from what the scheduler knows), and decode's scratch memory.
Never touches queries, keys or values.
"""

# The bodies of kernels are Triton's, not Python's, to which a type checker holds them.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Tokens of KV that one work item of decode reads. A part of the result: changing it changes bits.
SPLIT_TOKENS = 512
# Packed query rows (tokens x query heads of one KV head) of one work item of prefill.
PREFILL_TILE_ROWS = 128
# A tile that writes nothing and reads the first token of sequence 0: fills a list up.
EMPTY_TILE = (0, 0, 0, 1)
_SPLITS_PER_PASS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorkspace:
    """Scratch of `paged_decode` for up to max_splits splits over at most max_rows rows.

    items [max_splits, 2] int32: the row of a split (-1 - row if the row has several), its tokens;
    blocks [max_splits, SPLIT_TOKENS / block_tokens] int32; merges [max_rows, 3] int32: the rows of
    several splits, their first item and number of splits; counts [2] int32: items, merges;
    accs [max_splits, num_heads, head_dim] fp32; sums [max_splits, num_heads, 2] fp32 (peak, sum of
    weights).
    """

    items: torch.Tensor
    blocks: torch.Tensor
    merges: torch.Tensor
    counts: torch.Tensor
    accs: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def allocate(
        cls,
        *,
        max_rows: int,
        max_splits: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_tokens: int,
        device: torch.device | str,
    ) -> DecodeWorkspace:
        """max_splits as `max_decode_splits` returns it."""
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads, {num_kv_heads} KV heads")
        blocks_per_split = _blocks_per_split(block_tokens)
        int32 = {"dtype": torch.int32, "device": device}
        return cls(
            items=torch.zeros(max_splits, 2, **int32),
            blocks=torch.zeros(max_splits, blocks_per_split, **int32),
            merges=torch.zeros(max_rows, 3, **int32),
            counts=torch.zeros(2, **int32),
            accs=torch.empty(max_splits, num_heads, head_dim, device=device),
            sums=torch.empty(max_splits, num_heads, 2, device=device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Who looks at what in a decode step; on CUDA the workspace holds the work list.

    block_table [num_rows, max_blocks] int32; lengths [num_rows] int32: KV tokens that a row sees,
    its own included; 0 for a row of padding.
    """

    block_table: torch.Tensor
    lengths: torch.Tensor
    workspace: DecodeWorkspace


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Who looks at what in a prefill step.

    tiles [num_tiles, 4] int32 as `prefill_tiles` makes them; block_table [num_seqs, max_blocks]
    int32. For FP8 pages: blocks [num_used] int32, those that the sequences use, one sequence after
    the other; packed_table [num_seqs, most of a sequence] int32: where in `blocks` these are.
    """

    tiles: torch.Tensor
    block_table: torch.Tensor
    blocks: torch.Tensor | None = None
    packed_table: torch.Tensor | None = None


def max_decode_splits(
    max_rows: int, num_pool_blocks: int, max_blocks: int, block_tokens: int
) -> int:
    """The most splits that a step of max_rows rows can have.

    Rows of one sequence share blocks, so the pool bounds the splits only as long as every row is a
    sequence of its own: pass max_rows * max_blocks as num_pool_blocks where that does not hold.
    """
    per_split = _blocks_per_split(block_tokens)
    return max_rows + min(num_pool_blocks, max_rows * max_blocks) // per_split


def decode_workspace_size(
    max_rows: int, max_splits: int, num_heads: int, head_dim: int, *, block_tokens: int = 16
) -> int:
    """Bytes of a `DecodeWorkspace`."""
    item = 4 * (2 + _blocks_per_split(block_tokens)) + num_heads * (head_dim + 2) * 4
    return max_splits * item + max_rows * 3 * 4 + 2 * 4


def _blocks_per_split(block_tokens: int) -> int:
    if block_tokens < 16 or SPLIT_TOKENS % block_tokens:
        raise ValueError(f"block_tokens {block_tokens}: a power of two from 16 to {SPLIT_TOKENS}")
    return SPLIT_TOKENS // block_tokens


def decode_plan(
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    pdl: bool = False,
) -> DecodePlan:
    """Lists a step's splits into the workspace; nothing is read back, so it can be captured.

    block_table [num_rows, max_blocks] int32, rows of at least the row's blocks; lengths [num_rows]
    int32. Splits over the workspace's max_splits are dropped: plan with `max_decode_splits`.
    """
    num_rows = lengths.shape[0]
    if num_rows > workspace.merges.shape[0]:
        raise ValueError(f"{num_rows} rows, workspace for {workspace.merges.shape[0]}")
    plan = DecodePlan(block_table=block_table, lengths=lengths, workspace=workspace)
    if lengths.is_cuda:
        _launch_plan(plan, pdl=pdl)
    return plan


def _launch_plan(plan: DecodePlan, *, pdl: bool) -> None:
    workspace, num_rows = plan.workspace, plan.lengths.shape[0]
    _plan_kernel[(num_rows,)](
        plan.lengths,
        plan.block_table,
        workspace.items,
        workspace.blocks,
        workspace.merges,
        workspace.counts,
        num_rows,
        workspace.items.shape[0],
        plan.block_table.stride(0),
        ROWS=triton.next_power_of_2(num_rows),
        SPLIT=SPLIT_TOKENS,
        BLOCK_TOKENS=SPLIT_TOKENS // workspace.blocks.shape[1],
        SPLITS_PER_PASS=_SPLITS_PER_PASS,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


@triton.jit(do_not_specialize=["num_rows", "max_splits", "stride_table"])
def _plan_kernel(
    lengths_ptr,
    table_ptr,
    items_ptr,
    blocks_ptr,
    merges_ptr,
    counts_ptr,
    num_rows,
    max_splits,
    stride_table,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLITS_PER_PASS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    lengths = tl.load(lengths_ptr + rows, mask=rows < num_rows, other=0)
    # A row of padding has one split without tokens: whoever takes it writes the zeros.
    splits = tl.maximum((lengths + SPLIT - 1) // SPLIT, 1)
    first = tl.sum(tl.where(rows < row, splits, 0))
    first_merge = tl.sum(tl.where((rows < row) & (splits > 1), 1, 0))
    length = tl.load(lengths_ptr + row)
    num_splits = tl.maximum((length + SPLIT - 1) // SPLIT, 1)
    if num_splits > 1:
        tl.store(merges_ptr + first_merge * 3, row)
        tl.store(merges_ptr + first_merge * 3 + 1, first)
        tl.store(merges_ptr + first_merge * 3 + 2, num_splits)
    if row == num_rows - 1:
        tl.store(counts_ptr, tl.minimum(first + num_splits, max_splits))
        tl.store(counts_ptr + 1, first_merge + tl.where(num_splits > 1, 1, 0))
    per_split: tl.constexpr = SPLIT // BLOCK_TOKENS
    num_blocks = (length + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    lane = tl.arange(0, SPLITS_PER_PASS)
    place = tl.arange(0, SPLITS_PER_PASS * per_split)
    code = tl.where(num_splits > 1, -1 - row, row)
    for start in range(0, num_splits, SPLITS_PER_PASS):
        split = start + lane
        kept = (split < num_splits) & (first + split < max_splits)
        item = items_ptr + (first + split) * 2
        tl.store(item, tl.zeros_like(split) + code, mask=kept)
        tl.store(item + 1, tl.minimum(length - split * SPLIT, SPLIT), mask=kept)
        block = start * per_split + place
        block_id = tl.load(table_ptr + row * stride_table + block, mask=block < num_blocks)
        kept = (block < num_blocks) & (first + block // per_split < max_splits)
        tl.store(blocks_ptr + first * per_split + block, block_id, mask=kept)


def prefill_plan(
    block_table: torch.Tensor,
    row_counts: Sequence[int],
    starts: Sequence[int],
    *,
    group_size: int,
    block_tokens: int,
) -> PrefillPlan:
    """The work list of a step and where its blocks are; arguments as for `prefill_tiles`."""
    if len(row_counts) != len(starts) or len(starts) > block_table.shape[0]:
        raise ValueError(f"{len(row_counts)} counts, {len(starts)} starts, {block_table.shape}")
    used = [
        (seq, block)
        for seq, (count, start) in enumerate(zip(row_counts, starts, strict=True))
        for block in range(-(-(start + count) // block_tokens))
    ]
    places = _on(block_table.device, used)
    packed = torch.zeros_like(block_table[: len(starts)])
    seqs, columns = places.long().unbind(1)
    packed[seqs, columns] = torch.arange(len(used), dtype=torch.int32, device=packed.device)
    return PrefillPlan(
        tiles=_on(block_table.device, prefill_tiles(row_counts, starts, group_size=group_size)),
        block_table=block_table,
        blocks=block_table[seqs, columns],
        packed_table=packed,
    )


def prefill_tiles(
    row_counts: Sequence[int], starts: Sequence[int], *, group_size: int
) -> list[tuple[int, int, int, int]]:
    """Every sequence's rows in tiles, those with the longest context first: sequence, first row of
    the batch, number of rows, position of the first row.

    row_counts[s], starts[s]: rows of sequence s in the batch, which follow one another, and the
    position of its first; group_size: query heads per KV head.
    """
    tile_tokens = prefill_tile_tokens(group_size)
    tiles: list[tuple[int, int, int, int]] = []
    first_row = 0
    for seq, (count, start) in enumerate(zip(row_counts, starts, strict=True)):
        for offset in range(0, count, tile_tokens):
            num_rows = min(tile_tokens, count - offset)
            tiles.append((seq, first_row + offset, num_rows, start + offset))
        first_row += count
    tiles.sort(key=lambda tile: -(tile[2] + tile[3]))
    return tiles


def _on(device: torch.device, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """rows as int32 on the device, without waiting for it."""
    host = torch.tensor(rows, dtype=torch.int32)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def prefill_tile_tokens(group_size: int) -> int:
    """Tokens of one sequence in a tile of prefill; group_size: query heads per KV head."""
    return max(1, PREFILL_TILE_ROWS // group_size)
