"""Attention over paged KV at the shapes of Qwen3-8B: right, and the same bits in any company."""

# Triton types its language for the compiler, not for a checker.
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.attention_plan import (
    SPLIT_TOKENS,
    DecodePlan,
    DecodeWorkspace,
    PrefillPlan,
    decode_plan,
    prefill_plan,
)
from kernels.kv_pages import FP8, KvPages
from kernels.paged_decode import paged_decode, read_pages
from kernels.paged_decode_loads import unpack
from kernels.paged_prefill import paged_prefill

pytestmark = pytest.mark.gpu

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 32, 8, 128, 64
NUM_BLOCKS, NUM_LAYERS, LAYER = 200, 2, 1
SCALE = HEAD_DIM**-0.5
# Relative error (Frobenius) against float64 on the same stored KV: rounding of weights and result.
LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5, FP8: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


def make_pages(dtype: torch.dtype, num_kv_heads: int = NUM_KV_HEADS) -> KvPages:
    shape = (num_kv_heads, NUM_LAYERS, 2, BLOCK_TOKENS, HEAD_DIM)
    values = torch.randn(NUM_BLOCKS, *shape, device="cuda")
    if dtype != FP8:
        return KvPages(values=values.to(dtype))
    num_bytes = values.numel() // HEAD_DIM * (HEAD_DIM + 4)
    pages = KvPages.of(torch.zeros(num_bytes, dtype=torch.uint8, device="cuda"), shape, FP8)
    assert pages.scales is not None
    scales = values.abs().amax(-1) / 448
    pages.scales.copy_(scales)
    pages.values.copy_((values / scales[..., None]).to(FP8))
    return pages


def make_table(num_seqs: int, max_len: int) -> torch.Tensor:
    width = -(-max_len // BLOCK_TOKENS)
    rows = [torch.randperm(NUM_BLOCKS)[:width] for _ in range(num_seqs)]
    return torch.stack(rows).int().cuda()


def plan_decode(
    table: torch.Tensor, lengths: list[int], num_heads: int = NUM_HEADS, num_kv_heads: int = 8
) -> DecodePlan:
    workspace = DecodeWorkspace.allocate(
        max_rows=len(lengths),
        max_splits=sum(max(1, -(-n // SPLIT_TOKENS)) for n in lengths),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        block_tokens=BLOCK_TOKENS,
        device="cuda",
    )
    return decode_plan(table, torch.tensor(lengths, dtype=torch.int32).cuda(), workspace)


def query_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == FP8 else dtype


def reference(
    query: torch.Tensor, pages: KvPages, table: torch.Tensor, positions: list[tuple[int, int]]
) -> torch.Tensor:
    """float64; positions[row]: the row of the table and the row's position, -1 for padding."""
    out = torch.zeros(query.shape, dtype=torch.float64, device="cuda")
    num_kv_heads = pages.values.shape[1]
    for row, (seq, position) in enumerate(positions):
        if position < 0:
            continue
        blocks = table[seq, : position // BLOCK_TOKENS + 1]
        key, value = (x.double() for x in read_pages(pages, LAYER, blocks, position + 1))
        heads = query[row].double().unflatten(0, (num_kv_heads, -1))
        weights = torch.softmax(heads @ key.transpose(1, 2) * SCALE, dim=-1)
        out[row] = (weights @ value).flatten(0, 1)
    return out.flatten(1)


def check(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = ((out.double() - expected).norm() / expected.norm()).item()
    assert error <= LIMITS[dtype], error


LENGTHS = [1, 2, 63, 64, 65, 0, 255, 448, 511, 512, 513, 1000, 1025, 4096, 4097, 9000]


@DTYPES
@pytest.mark.parametrize("group_size", [1, 4, 7, 16])
def test_decode_is_softmax_attention(dtype: torch.dtype, group_size: int) -> None:
    pages = make_pages(dtype, 2)
    table = make_table(len(LENGTHS), max(LENGTHS))
    plan = plan_decode(table, LENGTHS, 2 * group_size, 2)
    query = torch.randn(len(LENGTHS), 2 * group_size, HEAD_DIM, device="cuda")
    query = query.to(query_dtype(dtype))
    out = paged_decode(query, pages, LAYER, plan, SCALE)
    positions = [(row, length - 1) for row, length in enumerate(LENGTHS)]
    check(out, reference(query, pages, table, positions), dtype)
    assert not out[LENGTHS.index(0)].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_a_decode_row_keeps_its_bits_in_any_company(dtype: torch.dtype) -> None:
    pages = make_pages(dtype)
    lengths = LENGTHS * 8
    table = make_table(len(lengths), max(lengths))
    plan = plan_decode(table, lengths)
    query = torch.randn(len(lengths), NUM_HEADS, HEAD_DIM, device="cuda").to(torch.bfloat16)
    together = paged_decode(query, pages, LAYER, plan, SCALE)
    for pdl in (False, True, True):
        assert torch.equal(paged_decode(query, pages, LAYER, plan, SCALE, pdl=pdl), together)
    for row, length in enumerate(LENGTHS):
        alone = plan_decode(table[row : row + 1].contiguous(), [length])
        out = paged_decode(query[row : row + 1], pages, LAYER, alone, SCALE)
        assert torch.equal(out[0], together[row]), length


def test_a_graph_holds_for_any_lengths() -> None:
    pages = make_pages(torch.bfloat16)
    table, longest = make_table(8, 9000), [9000] * 8
    plan = plan_decode(table, longest)
    query = torch.randn(8, NUM_HEADS, HEAD_DIM, device="cuda").to(torch.bfloat16)

    def step() -> torch.Tensor:
        decode_plan(table, plan.lengths, plan.workspace, pdl=True)
        # As in a model's step, the plan is not the kernel right before.
        return paged_decode(query.clone(), pages, LAYER, plan, SCALE, pdl=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([1] * 8, [0, 9000, 5, 512, 513, 8999, 64, 0], longest):
        plan.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        expected = paged_decode(query, pages, LAYER, plan_decode(table, lengths), SCALE)
        assert torch.equal(out, expected), lengths


@triton.jit
def _unpack_kernel(pairs_ptr, low_ptr, high_ptr, SIZE: tl.constexpr):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    pairs = tl.load(pairs_ptr + places)
    tl.store(low_ptr + places, unpack(pairs, False, True))
    tl.store(high_ptr + places, unpack(pairs, True, True))


def test_every_pair_of_fp8_values_is_unpacked_exactly() -> None:
    pairs = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cuda")
    low, high = torch.empty(2, 2**16, dtype=torch.float16, device="cuda")
    _unpack_kernel[(2**16 // 1024,)](pairs, low, high, SIZE=1024)
    expected = pairs.view(FP8).view(-1, 2).half()
    torch.testing.assert_close(
        torch.stack([low, high], 1), expected, rtol=0, atol=0, equal_nan=True
    )


COUNTS, STARTS = [1, 700, 64, 333, 1000], [300, 0, 64, 1001, 130]


def plan_prefill(table: torch.Tensor, counts: list[int], starts: list[int]) -> PrefillPlan:
    return prefill_plan(table, counts, starts, group_size=4, block_tokens=BLOCK_TOKENS)


@DTYPES
def test_prefill_is_causal_softmax_attention(dtype: torch.dtype) -> None:
    pages, table = make_pages(dtype), make_table(len(COUNTS), 1400)
    query = torch.randn(sum(COUNTS), NUM_HEADS, HEAD_DIM, device="cuda").to(query_dtype(dtype))
    out = paged_prefill(query, pages, LAYER, plan_prefill(table, COUNTS, STARTS), SCALE)
    positions = [
        (seq, start + i)
        for seq, (count, start) in enumerate(zip(COUNTS, STARTS, strict=True))
        for i in range(count)
    ]
    check(out, reference(query, pages, table, positions), dtype)


@pytest.mark.parametrize("group_size", [1, 7, 16])
def test_prefill_with_other_groups(group_size: int) -> None:
    pages, table = make_pages(torch.bfloat16, 2), make_table(1, 200)
    query = torch.randn(150, 2 * group_size, HEAD_DIM, device="cuda").bfloat16()
    plan = prefill_plan(table, [150], [50], group_size=group_size, block_tokens=BLOCK_TOKENS)
    out = paged_prefill(query, pages, LAYER, plan, SCALE)
    positions = [(0, 50 + i) for i in range(150)]
    check(out, reference(query, pages, table, positions), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_a_prefill_row_keeps_its_bits_in_any_chunk_and_company(dtype: torch.dtype) -> None:
    pages, table = make_pages(dtype), make_table(len(COUNTS), 1400)
    query = torch.randn(sum(COUNTS), NUM_HEADS, HEAD_DIM, device="cuda").to(query_dtype(dtype))
    together = paged_prefill(query, pages, LAYER, plan_prefill(table, COUNTS, STARTS), SCALE)
    first = 0
    for seq, (count, start) in enumerate(zip(COUNTS, STARTS, strict=True)):
        own, rows = table[seq : seq + 1].contiguous(), query[first : first + count]
        for cut in {0, 1, count // 3, count - 1} - {count}:
            parts = [
                paged_prefill(part, pages, LAYER, plan_prefill(own, [len(part)], [begin]), SCALE)
                for part, begin in ((rows[:cut], start), (rows[cut:], start + cut))
                if len(part)
            ]
            assert torch.equal(torch.cat(parts), together[first : first + count]), (seq, cut)
        first += count


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_memory_that_nobody_wrote_is_not_seen(dtype: torch.dtype) -> None:
    pages, table = make_pages(dtype), make_table(1, 100)
    query = torch.randn(100, NUM_HEADS, HEAD_DIM, device="cuda").to(query_dtype(dtype))
    prefill, decode = plan_prefill(table, [100], [0]), plan_decode(table, [100])
    before = paged_prefill(query, pages, LAYER, prefill, SCALE)
    last = paged_decode(query[99:], pages, LAYER, decode, SCALE)
    pages.values[int(table[0, 1]), :, :, :, 36:] = torch.tensor(torch.nan).to(dtype).cuda()
    if pages.scales is not None:
        pages.scales[int(table[0, 1]), :, :, :, 36:] = torch.nan
    assert torch.equal(paged_prefill(query, pages, LAYER, prefill, SCALE), before)
    assert torch.equal(paged_decode(query[99:], pages, LAYER, decode, SCALE), last)


@DTYPES
def test_decode_and_prefill_agree_within_rounding(dtype: torch.dtype) -> None:
    """Not bit for bit: decode cuts KV into splits, prefill carries one softmax through."""
    pages, table = make_pages(dtype), make_table(1, 700)
    query = torch.randn(700, NUM_HEADS, HEAD_DIM, device="cuda").to(query_dtype(dtype))
    prefill = paged_prefill(query, pages, LAYER, plan_prefill(table, [700], [0]), SCALE)
    rows = table.expand(700, -1).contiguous()
    plan = plan_decode(rows, list(range(1, 701)))
    decode = paged_decode(query, pages, LAYER, plan, SCALE)
    check(prefill, decode.double(), dtype)
