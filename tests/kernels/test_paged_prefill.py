"""Prefill over paged KV: causal attention after a prefix, the same bits for any chunks."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_plan import PREFILL_TILE_ROWS, PrefillPlan, prefill_plan
from kernels.kv_pages import FP8, KvPages
from kernels.kv_unpack import _launch_triton as launch_unpack
from kernels.kv_unpack import kv_unpack
from kernels.paged_prefill import _launch_triton as launch_triton
from kernels.paged_prefill import paged_prefill

NUM_BLOCKS, NUM_LAYERS, LAYER, BLOCK_TOKENS, HEAD_DIM = 24, 2, 1, 32, 16
SCALE = 0.3


def make_pages(dtype: torch.dtype) -> KvPages:
    shape = (2, NUM_LAYERS, 2, BLOCK_TOKENS, HEAD_DIM)
    values = torch.randn(NUM_BLOCKS, *shape)
    if dtype != FP8:
        return KvPages(values=values.to(dtype))
    num_bytes = values.numel() // HEAD_DIM * (HEAD_DIM + 4)
    pages = KvPages.of(torch.zeros(num_bytes, dtype=torch.uint8), shape, FP8)
    assert pages.scales is not None
    scales = values.abs().amax(-1) / 448
    pages.scales.copy_(scales)
    pages.values.copy_((values / scales[..., None]).to(FP8))
    return pages


def make_plan(counts: list[int], starts: list[int], group_size: int) -> PrefillPlan:
    width = -(-max(c + s for c, s in zip(counts, starts, strict=True)) // BLOCK_TOKENS)
    table = torch.stack([torch.randperm(NUM_BLOCKS)[:width] for _ in counts]).int()
    return prefill_plan(table, counts, starts, group_size=group_size, block_tokens=BLOCK_TOKENS)


def expected_row(
    query: torch.Tensor, pages: KvPages, blocks: torch.Tensor, position: int
) -> torch.Tensor:
    """One row in float64, written for clearness: query [num_heads, head_dim]."""
    rows = []
    for head, vector in enumerate(query.double()):
        kv_head = head // (query.shape[0] // 2)
        kept = pages.values[blocks.long(), kv_head, LAYER].double()
        if pages.scales is not None:
            kept = kept * pages.scales[blocks.long(), kv_head, LAYER].double()[..., None]
        key, value = kept.transpose(0, 1).flatten(1, 2)[:, : position + 1]
        rows.append(torch.softmax(key @ vector * SCALE, 0) @ value)
    return torch.cat(rows)


@pytest.mark.parametrize("group_size", [1, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (FP8, 2e-3)], ids=str
)
def test_values_are_causal_softmax_attention(
    dtype: torch.dtype, limit: float, group_size: int
) -> None:
    torch.manual_seed(group_size)
    pages = make_pages(dtype)
    counts, starts = [1, 70, 33], [40, 0, 95]
    plan = make_plan(counts, starts, group_size)
    query_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    query = torch.randn(sum(counts), 2 * group_size, HEAD_DIM).to(query_dtype)
    out = launch_triton(query, pages, LAYER, plan, SCALE)
    twin = paged_prefill(query, pages, LAYER, plan, SCALE)
    places = [
        (seq, start + i)
        for seq, (n, start) in enumerate(zip(counts, starts, strict=True))
        for i in range(n)
    ]
    expected = torch.stack(
        [
            expected_row(query[row], pages, plan.block_table[seq], position)
            for row, (seq, position) in enumerate(places)
        ]
    )
    assert (out.double() - expected).norm() <= limit * expected.norm()
    assert (twin.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("cut", [1, 31, 32, 50])
def test_chunk_boundaries_change_no_bit(cut: int) -> None:
    pages = make_pages(torch.float16)
    whole = make_plan([90], [5], 2)
    query = torch.randn(90, 4, HEAD_DIM).half()
    out = launch_triton(query, pages, LAYER, whole, SCALE)
    parts = [
        launch_triton(
            query[rows],
            pages,
            LAYER,
            prefill_plan(
                whole.block_table, [count], [start], group_size=2, block_tokens=BLOCK_TOKENS
            ),
            SCALE,
        )
        for rows, count, start in ((slice(0, cut), cut, 5), (slice(cut, 90), 90 - cut, 5 + cut))
    ]
    assert torch.equal(torch.cat(parts), out)


def test_memory_that_nobody_wrote_is_not_seen() -> None:
    pages = make_pages(torch.float32)
    plan = make_plan([40], [0], 2)
    query = torch.randn(40, 4, HEAD_DIM)
    expected = paged_prefill(query, pages, LAYER, plan, SCALE)
    pages.values[int(plan.block_table[0, 1]), :, :, :, 8:] = torch.nan
    out = launch_triton(query, pages, LAYER, plan, SCALE)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_tiles_cover_every_row_once_and_the_heaviest_comes_first() -> None:
    counts, starts = [300, 1, 77], [0, 600, 10]
    plan = make_plan(counts, starts, 4)
    tiles = plan.tiles.tolist()
    covered = sorted(row for _, first, count, _ in tiles for row in range(first, first + count))
    assert covered == list(range(sum(counts)))
    assert all(count * 4 <= PREFILL_TILE_ROWS for _, _, count, _ in tiles)
    contexts = [count + start for _, _, count, start in tiles]
    assert contexts == sorted(contexts, reverse=True)


def test_blocks_of_all_sequences_are_listed_for_unpacking() -> None:
    plan = make_plan([1, 70, 33], [40, 0, 95], 2)
    assert plan.blocks is not None and plan.packed_table is not None
    for seq, num_blocks in enumerate((2, 3, 4)):
        found = plan.blocks[plan.packed_table[seq, :num_blocks].long()]
        assert torch.equal(found, plan.block_table[seq, :num_blocks])
    assert len(plan.blocks) == 9


def test_unpacked_blocks_hold_the_values() -> None:
    pages, blocks = make_pages(FP8), torch.tensor([7, 0, 7], dtype=torch.int32)
    assert pages.scales is not None
    expected = pages.values[:, :, LAYER].float() * pages.scales[:, :, LAYER][..., None]
    assert torch.equal(kv_unpack(pages, LAYER, blocks)[:, :, 0], expected[blocks.long()].half())
    assert torch.equal(launch_unpack(pages, LAYER, blocks), kv_unpack(pages, LAYER, blocks))
