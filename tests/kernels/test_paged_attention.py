"""Paged attention: softmax attention over the context, with the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from kernels import ops

NUM_BLOCKS, NUM_LAYERS = 200, 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Bench:
    """A random cache and its plans; sequence i owns blocks i * 20 to i * 20 + 19."""

    def __init__(
        self,
        group_size: int,
        head_dim: int = 16,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        num_parts: int = 2,
    ) -> None:
        self.group_size, self.num_kv_heads = group_size, 2
        shape = (NUM_BLOCKS, self.num_kv_heads, NUM_LAYERS, num_parts, block_tokens, head_dim)
        self.cache = torch.randn(shape).to(dtype)
        self.wide_rows = ops.exact_rows(group_size, head_dim, block_tokens, torch.device("cpu"))
        self.scratch = torch.empty(ops.scratch_size(10, 20, self.cache))

    def query(self, num_tokens: int) -> torch.Tensor:
        num_heads = self.num_kv_heads * self.group_size
        return torch.randn(num_tokens, num_heads, self.cache.shape[-1]).to(self.cache.dtype)

    def group(self, rows: slice, starts: list[int], sequences: list[int]) -> ops.Group:
        num_tokens = (rows.stop - rows.start) // len(starts)
        tables = [
            list(range(i * 20, i * 20 + -(-(start + num_tokens) // self.cache.shape[4])))
            for i, start in zip(sequences, starts, strict=True)
        ]
        return ops.make_group(
            rows,
            starts,
            tables,
            self.cache,
            num_query_heads=self.group_size,
            wide_rows=self.wide_rows,
            scratch=self.scratch,
        )

    def attend(self, query: torch.Tensor, *groups: ops.Group) -> torch.Tensor:
        return ops.paged_attention(query, self.cache, 1, list(groups), self.cache.shape[-1] ** -0.5)

    def expected(self, query: torch.Tensor, start: int, sequence: int) -> torch.Tensor:
        """Dense softmax attention in float64."""
        num_tokens = query.shape[0]
        pages = self.cache[sequence * 20 : sequence * 20 + 20, :, 1].double()
        # [num_kv_heads, num_parts, context, head_dim]
        flat = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)
        flat = flat.repeat_interleave(self.group_size, 0)
        scores = query.double().transpose(0, 1) @ flat[:, 0].transpose(1, 2)
        scores *= self.cache.shape[-1] ** -0.5
        keys, positions = torch.arange(flat.shape[2]), torch.arange(start, start + num_tokens)
        scores.masked_fill_(keys[None, :] > positions[:, None], -torch.inf)
        return (scores.softmax(-1) @ flat[:, -1]).transpose(0, 1)


@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 8, 12])
@pytest.mark.parametrize("start", [0, 5, 16, 200])
def test_values_are_softmax_attention(group_size: int, start: int) -> None:
    bench = Bench(group_size)
    query = bench.query(70)
    out = bench.attend(query, bench.group(slice(0, 70), [start], [3]))
    torch.testing.assert_close(out.double(), bench.expected(query, start, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_size", [4, 16])
def test_a_latent_is_key_and_value_at_once(group_size: int) -> None:
    bench = Bench(group_size, head_dim=40, num_parts=1)
    query = bench.query(70)
    out = bench.attend(query, bench.group(slice(0, 70), [200], [3]))
    torch.testing.assert_close(out.double(), bench.expected(query, 200, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_chunks_and_decode_agree_bit_for_bit(group_size: int, dtype: torch.dtype) -> None:
    """Contexts over one pass of splits, where the ordered merge works."""
    bench = Bench(group_size, dtype=dtype)
    query = bench.query(300)
    whole = bench.attend(query, bench.group(slice(0, 300), [0], [1]))
    for cut in (1, 16, 130, 257, 299):
        parts = [
            bench.attend(query[:cut], bench.group(slice(0, cut), [0], [1])),
            bench.attend(query[cut:], bench.group(slice(0, 300 - cut), [cut], [1])),
        ]
        assert torch.equal(torch.cat(parts), whole), cut
    for position in (0, 15, 16, 255, 256, 299):
        alone = bench.attend(query[position][None], bench.group(slice(0, 1), [position], [1]))
        assert torch.equal(alone[0], whole[position]), position


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_among_longer_and_shorter_mates_keeps_its_bits(
    dtype: torch.dtype, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    bench = Bench(2, dtype=dtype)
    query = bench.query(9)
    positions = [3, 40, 319, 256, 17, 0, 100, 255, 64]
    groups = bench.group(slice(0, 9), positions, list(range(9)))
    together = bench.attend(query, groups)
    for i, position in enumerate(positions):
        alone = bench.attend(query[i][None], bench.group(slice(0, 1), [position], [i]))
        assert torch.equal(alone[0], together[i]), i
        torch.testing.assert_close(
            alone.double(),
            bench.expected(query[i][None], position, i),
            rtol=1e-4 if dtype == torch.float32 else 2e-2,
            atol=1e-5 if dtype == torch.float32 else 2e-2,
        )


def test_rows_without_a_group_are_zero() -> None:
    bench = Bench(2)
    out = bench.attend(bench.query(8), bench.group(slice(0, 5), [0], [1]))
    assert out[:5].abs().sum() > 0 and not out[5:].any()
