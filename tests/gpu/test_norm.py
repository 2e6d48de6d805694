"""Norm, SiLU and quantisation on a GPU at model shapes: values, and bits that depend on nothing."""

from __future__ import annotations

import pytest
import torch

from kernels.fp8_quant import GROUP, Fp8Rows, Quantise, _quantise_torch, quantise
from kernels.product import Product
from kernels.rmsnorm import _rmsnorm_torch, add_rmsnorm, rmsnorm
from kernels.silu_mul import _silu_mul_torch, silu_mul
from tests.support.fp8_rows import assert_same_rows, bytes_of

pytestmark = pytest.mark.gpu

EPS = 1e-6
HIDDEN, INTERMEDIATE = 4096, 12288  # Qwen3-8B
GROUPS: dict[Quantise, int | None] = {"token": None, "group": GROUP}
# Two ulps: another order of addition and approximate rsqrt, exp and division move a rounding by
# one, and the product with the weight rounds again.
ULP = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 1e-6}
WARPS = (1, 2, 4, 8, 16, 32)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def parts(out: torch.Tensor | Fp8Rows) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [bytes_of(out), out.scales]


def assert_same_bits(out: torch.Tensor | Fp8Rows, other: torch.Tensor | Fp8Rows) -> None:
    for part, expected in zip(parts(out), parts(other), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize("shape", [(1, HIDDEN), (70, INTERMEDIATE), (4000, HIDDEN), (5, 1100)])
def test_quantisation_is_the_twin(shape: tuple[int, int], group: int | None) -> None:
    x = normal(*shape)
    x[0, :200] = 0
    assert_same_rows(quantise(x, group), _quantise_torch(x, group))


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("shape", [(1, HIDDEN), (33, 5120), (4000, HIDDEN), (9, 300)])
def test_add_rmsnorm_is_the_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype).flip(0).flip(1)
    weight = normal(shape[1], dtype=dtype)
    out, total = add_rmsnorm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    expected = _rmsnorm_torch(x + residual, weight, EPS)
    torch.testing.assert_close(out, expected, rtol=ULP[dtype], atol=1e-6)
    assert_same_bits(rmsnorm(total, weight, EPS), out)


def test_rmsnorm_of_heads_is_the_twin() -> None:
    x, weight = normal(50, 48, 128)[:, :40], normal(40, 128)
    expected = _rmsnorm_torch(x, weight, EPS)
    out = rmsnorm(x, weight, EPS)
    torch.testing.assert_close(out, expected, rtol=ULP[torch.bfloat16], atol=1e-6)


@pytest.mark.parametrize("kind", [None, "token", "group"])
@pytest.mark.parametrize("width", [1024, HIDDEN, 5120])
def test_bits_depend_neither_on_warps_nor_on_rows(width: int, kind: Quantise | None) -> None:
    x, residual, weight = normal(600, width), normal(600, width).flip(0), normal(width)
    whole, total = add_rmsnorm(x, residual, weight, EPS, quantise=kind)
    for warps in WARPS:
        out, _ = add_rmsnorm(x, residual, weight, EPS, quantise=kind, warps=warps)
        assert_same_bits(out, whole)
    for num_rows in (1, 2, 7, 64, 100, 513):
        tail = slice(600 - num_rows, 600)
        out, sums = add_rmsnorm(x[tail], residual[tail], weight, EPS, quantise=kind)
        assert torch.equal(sums, total[tail])
        for part, expected in zip(parts(out), parts(whole), strict=True):
            assert torch.equal(part, expected[tail])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_warps_change_no_bit_of_wider_types(dtype: torch.dtype) -> None:
    """Their squares are not exact in fp32: a fused multiply-add would show."""
    x, weight = normal(64, 2048, dtype=dtype), normal(2048, dtype=dtype)
    whole = rmsnorm(x, weight, EPS, warps=1)
    for warps in WARPS[1:]:
        assert_same_bits(rmsnorm(x, weight, EPS, warps=warps), whole)


@pytest.mark.parametrize("kind", GROUPS)
def test_fused_quantisation_is_that_of_the_rounded_result(kind: Quantise) -> None:
    x, residual, weight = normal(300, HIDDEN), normal(300, HIDDEN).flip(0), normal(HIDDEN)
    normed, _ = add_rmsnorm(x, residual, weight, EPS)
    out, _ = add_rmsnorm(x, residual, weight, EPS, quantise=kind)
    assert isinstance(out, Fp8Rows) and isinstance(normed, torch.Tensor)
    assert_same_rows(out, _quantise_torch(normed, GROUPS[kind]))
    gate_up = normal(300, 2 * INTERMEDIATE)
    fed, out = silu_mul(gate_up), silu_mul(gate_up, quantise=kind)
    assert isinstance(out, Fp8Rows) and isinstance(fed, torch.Tensor)
    assert_same_rows(out, _quantise_torch(fed, GROUPS[kind]))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_gives_the_bits_of_its_sum(num_splits: int, bias: bool) -> None:
    def product(width: int) -> Product:
        partials = normal(num_splits, 40, width, dtype=torch.float32)
        scales = normal(40, dtype=torch.float32).abs(), normal(width, dtype=torch.float32).abs()
        return Product(
            partials=partials,
            row_scales=scales[0],
            col_scales=scales[1],
            bias=normal(width) if bias else None,
        )

    x, residual, weight = product(HIDDEN), normal(40, HIDDEN), normal(HIDDEN)
    out = add_rmsnorm(x, residual, weight, EPS, quantise="token", pdl=True)
    expected = add_rmsnorm(x.sum(torch.bfloat16), residual, weight, EPS, quantise="token")
    assert torch.equal(out[1], expected[1])
    assert_same_bits(out[0], expected[0])
    gate_up = product(2 * INTERMEDIATE)
    fed = silu_mul(gate_up, dtype=torch.bfloat16, quantise="token", pdl=True)
    assert_same_bits(fed, silu_mul(gate_up.sum(torch.bfloat16), quantise="token"))


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("shape", [(1, INTERMEDIATE), (500, INTERMEDIATE), (7, 300)])
def test_silu_mul_is_the_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = normal(shape[0], 2 * shape[1], dtype=dtype) * 4
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0
    out = silu_mul(gate_up)
    torch.testing.assert_close(out, _silu_mul_torch(gate_up), rtol=ULP[dtype], atol=1e-6)


@pytest.mark.parametrize("kind", [None, "token", "group"])
def test_silu_bits_do_not_depend_on_rows(kind: Quantise | None) -> None:
    gate_up = normal(600, 2 * INTERMEDIATE)
    whole = parts(silu_mul(gate_up, quantise=kind))
    for num_rows in (1, 2, 64, 513):
        tail = slice(600 - num_rows, 600)
        for part, expected in zip(
            parts(silu_mul(gate_up[tail], quantise=kind)), whole, strict=True
        ):
            assert torch.equal(part, expected[tail])


def test_a_chain_of_overlapping_launches_in_a_graph_is_the_plain_chain() -> None:
    """Each kernel starts under its predecessor: a missing wait would read stale rows."""
    weight = 1 + 0.1 * normal(HIDDEN)
    residual = normal(16, HIDDEN)
    first, up = normal(16, HIDDEN), normal(16, HIDDEN)

    def chain(pdl: bool) -> tuple[torch.Tensor, Fp8Rows]:
        x, total = first, residual
        for _ in range(30):
            normed, total = add_rmsnorm(x, total, weight, EPS, pdl=pdl)
            assert isinstance(normed, torch.Tensor)
            fed = silu_mul(torch.cat((normed, up), dim=1), pdl=False)
            assert isinstance(fed, torch.Tensor)
            x = fed
            x, total = add_rmsnorm(x, total, weight, EPS, pdl=pdl)
            assert isinstance(x, torch.Tensor)
        return total, quantise(x, pdl=pdl)

    total, rows = chain(False)
    chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        overlapped, overlapped_rows = chain(True)
    for _ in range(5):
        graph.replay()
    assert torch.equal(overlapped, total)
    assert_same_bits(overlapped_rows, rows)
