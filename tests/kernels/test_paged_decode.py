"""Decode over paged KV: softmax attention for any mix of lengths, each row as if it were alone."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_plan import SPLIT_TOKENS, DecodePlan, DecodeWorkspace, decode_plan
from kernels.attention_plan import _launch_plan as launch_plan
from kernels.kv_pages import FP8, KvPages
from kernels.paged_decode import _launch_triton as launch_triton
from kernels.paged_decode import paged_decode

NUM_BLOCKS, NUM_LAYERS, LAYER = 40, 2, 1


def make_pages(
    dtype: torch.dtype, num_kv_heads: int = 2, block_tokens: int = 32, head_dim: int = 16
) -> KvPages:
    shape = (num_kv_heads, NUM_LAYERS, 2, block_tokens, head_dim)
    values = torch.randn(NUM_BLOCKS, *shape)
    if dtype != FP8:
        return KvPages(values=values.to(dtype))
    num_bytes = NUM_BLOCKS * shape[0] * NUM_LAYERS * 2 * block_tokens * (head_dim + 4)
    pages = KvPages.of(torch.zeros(num_bytes, dtype=torch.uint8), shape, FP8)
    assert pages.scales is not None
    scales = values.abs().amax(-1) / 448
    pages.scales.copy_(scales)
    pages.values.copy_((values / scales[..., None]).to(FP8))
    return pages


def make_plan(lengths: list[int], pages: KvPages, group_size: int) -> DecodePlan:
    """Shuffled blocks; rows may share them."""
    num_kv_heads, block_tokens, head_dim = (pages.values.shape[i] for i in (1, 4, 5))
    width = -(-max(lengths) // block_tokens)
    table = torch.stack([torch.randperm(NUM_BLOCKS)[:width] for _ in lengths]).int()
    workspace = DecodeWorkspace.allocate(
        max_rows=len(lengths),
        max_splits=sum(max(1, -(-n // SPLIT_TOKENS)) for n in lengths),
        num_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        device="cpu",
    )
    plan = decode_plan(table, torch.tensor(lengths, dtype=torch.int32), workspace)
    launch_plan(plan, pdl=False)
    return plan


def make_query(plan: DecodePlan, dtype: torch.dtype) -> torch.Tensor:
    num_heads, head_dim = plan.workspace.accs.shape[1:]
    return torch.randn(plan.lengths.shape[0], num_heads, head_dim).to(dtype)


LENGTHS = [1, 31, 32, 33, 0, SPLIT_TOKENS - 1, SPLIT_TOKENS, SPLIT_TOKENS + 1, 900]


@pytest.mark.parametrize("group_size", [1, 4, 11])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (FP8, 2e-3)], ids=str
)
def test_values_are_softmax_attention(dtype: torch.dtype, limit: float, group_size: int) -> None:
    torch.manual_seed(group_size)
    pages = make_pages(dtype)
    plan = make_plan(LENGTHS, pages, group_size)
    query = make_query(plan, torch.float32 if dtype == torch.float32 else torch.float16)
    expected = paged_decode(query, pages, LAYER, plan, 0.3).double()
    out = launch_triton(query, pages, LAYER, plan, 0.3).double()
    assert not out[LENGTHS.index(0)].any()
    assert (out - expected).norm() <= limit * expected.norm()


def test_head_dim_and_blocks_of_other_sizes() -> None:
    pages = make_pages(torch.float32, num_kv_heads=1, block_tokens=16, head_dim=24)
    plan = make_plan([17, SPLIT_TOKENS + 44], pages, 2)
    query = make_query(plan, torch.float32)
    expected = paged_decode(query, pages, LAYER, plan, 0.3)
    out = launch_triton(query, pages, LAYER, plan, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_row_keeps_its_bits_in_any_company() -> None:
    pages = make_pages(torch.float16)
    plan = make_plan(LENGTHS, pages, 2)
    query = make_query(plan, torch.float16)
    together = launch_triton(query, pages, LAYER, plan, 0.3)
    for row, length in enumerate(LENGTHS):
        alone = make_plan([length], pages, 2)
        alone.block_table.copy_(plan.block_table[row : row + 1, : alone.block_table.shape[1]])
        launch_plan(alone, pdl=False)
        out = launch_triton(query[row : row + 1], pages, LAYER, alone, 0.3)
        assert torch.equal(out[0], together[row]), length


def test_memory_that_nobody_wrote_is_not_seen() -> None:
    pages = make_pages(torch.float32)
    plan = make_plan([40], pages, 2)
    query = make_query(plan, torch.float32)
    expected = paged_decode(query, pages, LAYER, plan, 0.3)
    pages.values[int(plan.block_table[0, 1]), :, :, :, 8:] = torch.nan
    out = launch_triton(query, pages, LAYER, plan, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
