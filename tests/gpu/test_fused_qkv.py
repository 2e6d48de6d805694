"""Norm, rope and KV write in one kernel on a GPU, at Qwen3-8B's shape and its TP-8 share."""

from __future__ import annotations

import pytest
import torch

from kernels.fused_qkv import _qkv_finish_torch, qkv_finish
from kernels.kv_pages import FP8, KvPages
from kernels.product import Product
from kernels.rope import rope_tables

pytestmark = pytest.mark.gpu

EPS = 1e-6
HEAD_DIM, NUM_LAYERS, BLOCK_TOKENS, NUM_BLOCKS, LAYER = 128, 3, 64, 40, 2
CONTEXT_LEN = 9000
# One ulp after the norm, one more in each product of the rotation and in their sum; absolutely,
# the ulp of values up to 4, which the rotation may cancel.
ULP = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2e-6}


class Setting:
    """Tables, norms, places and random rows of one shape; every seventh row is padding."""

    def __init__(self, num_rows: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
        self.random = torch.Generator("cuda").manual_seed(num_rows)
        self.num_rows, self.heads, self.dtype = num_rows, heads, dtype
        self.width = (heads[0] + 2 * heads[1]) * HEAD_DIM
        inv_freq = 1e6 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
        self.tables = rope_tables(inv_freq, CONTEXT_LEN, dtype)
        self.norms = (1 + 0.1 * self.normal(HEAD_DIM), 1 + 0.1 * self.normal(HEAD_DIM))
        self.positions = self.integers(CONTEXT_LEN, num_rows)
        places = torch.randperm(NUM_BLOCKS * BLOCK_TOKENS, device="cuda", generator=self.random)
        places = places[:num_rows]
        self.block_ids, self.offsets = places // BLOCK_TOKENS, places % BLOCK_TOKENS
        self.block_ids[6::7] = -1

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random, device="cuda").to(self.dtype)

    def integers(self, limit: int, count: int) -> torch.Tensor:
        return torch.randint(limit, (count,), generator=self.random, device="cuda")

    def pages(self, fp8: bool) -> KvPages:
        """Zeros; FP8 in the layout that keeps a head's scales behind its values."""
        shape = (self.heads[1], NUM_LAYERS, 2, BLOCK_TOKENS, HEAD_DIM)
        dtype = FP8 if fp8 else self.dtype
        token = HEAD_DIM + 4 if fp8 else HEAD_DIM * dtype.itemsize
        num_bytes = NUM_BLOCKS * self.heads[1] * NUM_LAYERS * 2 * BLOCK_TOKENS * token
        storage = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
        return KvPages.of(storage, shape, dtype)

    def finish(
        self, qkv: torch.Tensor | Product, pages: KvPages, rows: slice, *, pdl: bool = False
    ) -> torch.Tensor:
        return qkv_finish(
            qkv, q_norm=self.norms[0], k_norm=self.norms[1], eps=EPS, cos=self.tables[0],
            sin=self.tables[1], positions=self.positions[rows], block_ids=self.block_ids[rows],
            offsets=self.offsets[rows], pages=pages, layer=LAYER, num_heads=self.heads[0],
            num_kv_heads=self.heads[1], pdl=pdl,
        )  # fmt: skip

    def twin(self, qkv: torch.Tensor, pages: KvPages) -> torch.Tensor:
        where = (self.positions, self.block_ids, self.offsets)
        return _qkv_finish_torch(
            qkv, self.norms, EPS, self.tables, where, pages, LAYER, *self.heads, False
        )


def dequantised(pages: KvPages) -> torch.Tensor:
    values = pages.values.float()
    return values if pages.scales is None else values * pages.scales[..., None]


EVERY = slice(None)


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("heads", [(32, 8), (4, 1), (12, 3)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 64, 2000])
def test_the_kernel_is_the_twin(num_rows: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    setting = Setting(num_rows, heads, dtype)
    qkv = setting.normal(num_rows, setting.width)
    pages, expected_pages = setting.pages(False), setting.pages(False)
    q, expected = setting.finish(qkv, pages, EVERY), setting.twin(qkv, expected_pages)
    tolerance = ULP[dtype]
    torch.testing.assert_close(q, expected, rtol=tolerance, atol=4 * tolerance)
    values = expected_pages.values
    torch.testing.assert_close(pages.values, values, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("num_rows", [1, 500])
def test_fp8_pages_are_the_twins(num_rows: int) -> None:
    setting = Setting(num_rows, (32, 8), torch.bfloat16)
    qkv = setting.normal(num_rows, setting.width)
    pages, expected_pages, plain = setting.pages(True), setting.pages(True), setting.pages(False)
    q, expected = setting.finish(qkv, pages, EVERY), setting.twin(qkv, expected_pages)
    assert torch.equal(q, setting.finish(qkv, plain, EVERY))
    torch.testing.assert_close(q, expected, rtol=ULP[q.dtype], atol=4 * ULP[q.dtype])
    assert pages.scales is not None and expected_pages.scales is not None
    torch.testing.assert_close(pages.scales, expected_pages.scales, rtol=2.0**-7, atol=0)
    # Half an ulp of e4m3 at the largest value of a head, at most.
    limit = (pages.scales * 16 * 1.01)[..., None]
    assert ((dequantised(pages) - plain.values.float()).abs() <= limit).all()
    # V is not normed: there both quantise the same values.
    for values, other in zip(
        (pages.values.view(torch.uint8), pages.scales),
        (expected_pages.values.view(torch.uint8), expected_pages.scales),
        strict=True,
    ):
        assert torch.equal(values[:, :, :, 1], other[:, :, :, 1])


@pytest.mark.parametrize("fp8", [False, True])
def test_bits_depend_neither_on_rows_nor_on_the_form_of_the_product(fp8: bool) -> None:
    setting = Setting(300, (32, 8), torch.bfloat16)
    partials = torch.randn((4, 300, setting.width), generator=setting.random, device="cuda")
    scales = torch.rand(300 + setting.width, generator=setting.random, device="cuda")
    product = Product(
        partials=partials, row_scales=scales[:300], col_scales=scales[300:],
        bias=setting.normal(setting.width),
    )  # fmt: skip
    finished = product.sum(torch.bfloat16)
    whole_pages, pages, one_by_one = (setting.pages(fp8) for _ in range(3))
    whole = setting.finish(finished, whole_pages, EVERY)
    assert torch.equal(setting.finish(product, pages, EVERY, pdl=True), whole)
    for row in range(300):
        rows = slice(row, row + 1)
        assert torch.equal(setting.finish(finished[rows], one_by_one, rows), whole[rows])
    for other in (pages, one_by_one):
        assert torch.equal(other.values.view(torch.uint8), whole_pages.values.view(torch.uint8))
        if whole_pages.scales is not None:
            assert other.scales is not None and torch.equal(other.scales, whole_pages.scales)
