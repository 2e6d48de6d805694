"""Norm, rope and KV write in one: the kernel in the interpreter, and the twin it must equal."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from kernels import fused_qkv, ops
from kernels.fp8_quant import quantise
from kernels.kv_pages import FP8, KvPages
from kernels.product import Product
from tests.support.fp8_rows import INTERPRETER_WRONG_BYTES

EPS = 1e-6
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, LAYER = 6, 2, 32, 1
WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
# One ulp after the norm, carried through the rotation.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-9}
DTYPES = list(TOLERANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Six rows; the fourth and, as block_ids ends before it, the last are padding."""

    dtype: torch.dtype
    fp8: bool = False
    norm: bool = True
    positions: torch.Tensor = field(default_factory=lambda: torch.tensor([3, 7, 49, 0, 1, 0]))
    block_ids: torch.Tensor = field(default_factory=lambda: torch.tensor([4, 4, 0, -1, 5]))
    offsets: torch.Tensor = field(default_factory=lambda: torch.tensor([2, 3, 0, 0, 1]))

    def pages(self) -> KvPages:
        """Filled with twos, so that every write shows."""
        shape = (6, NUM_KV_HEADS, 3, 2, 4, HEAD_DIM)
        if not self.fp8:
            return KvPages(values=torch.full(shape, 2.0, dtype=self.dtype))
        values = torch.full(shape, 2.0).to(FP8)
        return KvPages(values=values, scales=torch.full(shape[:-1], 2.0))

    def norms(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.norm:
            return None
        generator = torch.Generator().manual_seed(1)
        q_norm, k_norm = torch.randn(2, HEAD_DIM, generator=generator).to(self.dtype)
        return q_norm, k_norm

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq = 1.0 / 100.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        return ops.rope_tables(inv_freq, 50, self.dtype)

    def twin(self, qkv: torch.Tensor | Product, pages: KvPages) -> torch.Tensor:
        q_norm, k_norm = self.norms() or (None, None)
        cos, sin = self.tables()
        return fused_qkv.qkv_finish(
            qkv, q_norm=q_norm, k_norm=k_norm, eps=EPS, cos=cos, sin=sin, pages=pages, layer=LAYER,
            positions=self.positions, block_ids=self.block_ids, offsets=self.offsets,
            num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS,
        )  # fmt: skip

    def kernel(self, qkv: torch.Tensor | Product, pages: KvPages) -> torch.Tensor:
        where = (self.positions, self.block_ids, self.offsets)
        return fused_qkv._launch_triton(
            qkv, self.norms(), EPS, self.tables(), where, pages, LAYER, NUM_HEADS, NUM_KV_HEADS,
            False,
        )  # fmt: skip


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_the_twin_is_the_separate_operations(dtype: torch.dtype, norm: bool) -> None:
    case = Case(dtype=dtype, norm=norm)
    qkv, pages = torch.randn(6, WIDTH).to(dtype), case.pages()
    heads = qkv.view(6, -1, HEAD_DIM)
    qk, value = heads[:, :-NUM_KV_HEADS], heads[:, -NUM_KV_HEADS:]
    if norms := case.norms():
        weight = torch.stack([norms[0]] * NUM_HEADS + [norms[1]] * NUM_KV_HEADS)
        qk = ops.rmsnorm(qk, weight, EPS)
        assert isinstance(qk, torch.Tensor)
    cos, sin = (table[case.positions][:, None] for table in case.tables())
    qk = ops.rope(qk, cos, sin)
    cache, kept = case.pages().values, torch.tensor([0, 1, 2, 4])
    where = (case.block_ids[kept], case.offsets[kept])
    ops.kv_write(cache, LAYER, qk[kept, NUM_HEADS:], value[kept], *where)
    assert torch.equal(case.twin(qkv, pages), qk[:, :NUM_HEADS])
    assert torch.equal(pages.values, cache)


def test_fp8_pages_of_the_twin_hold_a_scale_per_token_and_head() -> None:
    case = Case(dtype=torch.float32, fp8=True)
    qkv, pages, plain = torch.randn(6, WIDTH), case.pages(), Case(dtype=torch.float32).pages()
    case.twin(qkv, pages)
    Case(dtype=torch.float32).twin(qkv, plain)
    assert pages.scales is not None
    for block, offset in ((4, 2), (4, 3), (0, 0), (5, 1)):
        expected = quantise(plain.values[block, :, LAYER, :, offset].reshape(-1, HEAD_DIM))
        stored = pages.values[block, :, LAYER, :, offset].reshape(-1, HEAD_DIM)
        assert torch.equal(stored.float(), expected.values.float())
        assert torch.equal(pages.scales[block, :, LAYER, :, offset].reshape(-1, 1), expected.scales)
        pages.scales[block, :, LAYER, :, offset] = 2.0
    assert (pages.scales == 2.0).all()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_the_twin(dtype: torch.dtype, norm: bool, fp8: bool) -> None:
    case = Case(dtype=dtype, norm=norm, fp8=fp8)
    qkv = torch.randn(6, WIDTH).to(dtype)
    pages, expected_pages = case.pages(), case.pages()
    q, expected = case.kernel(qkv, pages), case.twin(qkv, expected_pages)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(q, expected, rtol=tolerance, atol=tolerance)
    if expected_pages.scales is None:
        values = expected_pages.values
        torch.testing.assert_close(pages.values, values, rtol=tolerance, atol=tolerance)
    else:
        torch.testing.assert_close(pages.scales, expected_pages.scales)
        wrong = (pages.values.float() - expected_pages.values.float()).ne(0).float().mean()
        assert wrong.item() <= INTERPRETER_WRONG_BYTES


def test_a_product_gives_the_bits_of_its_sum() -> None:
    case = Case(dtype=torch.float16)
    product = Product(
        partials=torch.randn(3, 6, WIDTH), row_scales=torch.rand(6), col_scales=torch.rand(WIDTH),
        bias=torch.randn(WIDTH).half(),
    )  # fmt: skip
    pages, expected_pages = case.pages(), case.pages()
    q = case.kernel(product, pages)
    assert torch.equal(q, case.kernel(product.sum(torch.float16), expected_pages))
    assert torch.equal(pages.values, expected_pages.values)
    assert torch.equal(case.twin(product, pages), case.twin(product.sum(torch.float16), pages))


def test_one_norm_without_the_other_is_refused() -> None:
    case = Case(dtype=torch.float32)
    cos, sin = case.tables()
    with pytest.raises(ValueError, match="both or none"):
        fused_qkv.qkv_finish(
            torch.zeros(6, WIDTH), q_norm=torch.ones(HEAD_DIM), k_norm=None, eps=EPS, cos=cos,
            sin=sin, pages=case.pages(), layer=0, positions=case.positions,
            block_ids=case.block_ids, offsets=case.offsets, num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
        )  # fmt: skip
