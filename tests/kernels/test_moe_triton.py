"""The kernels of a mixture of experts, in the interpreter, against their twins.

Bits are compared on a GPU (tests/gpu/test_moe.py): the interpreter's product is numpy's.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from kernels import moe_align, moe_launch, moe_routing
from kernels.fp8_quant import FP8, GROUP, Fp8Rows, quantise
from kernels.moe_gemm import moe_mlp
from kernels.moe_routing import Routed, Routing, moe_route
from kernels.silu_mul import silu_mul
from kernels.weight_stack import WeightStack, prepare_stack
from tests.support.fp8_rows import INTERPRETER_WRONG_BYTES, bytes_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's turn is CPU's")

NUM_EXPERTS, HIDDEN, TOP_K = 6, 256, 2
# Operands are the same numbers on both sides; what differs is the order of an fp32 sum.
TOLERANCE = 1e-6
V3: dict[str, Any] = {
    "scoring": "sigmoid",
    "num_groups": 4,
    "top_groups": 2,
    "group_score": "top2",
    "scale": 2.5,
}


@pytest.mark.parametrize(
    ("num_experts", "routing", "biased"),
    [
        (8, Routing(top_k=2, renormalise=True), False),
        (60, Routing(top_k=4, renormalise=False), False),
        (32, Routing(top_k=6, renormalise=True, **V3), True),
        (40, Routing(top_k=6, renormalise=False, num_groups=8, top_groups=3, scale=16.0), False),
        (32, Routing(top_k=8, renormalise=True, scoring="sigmoid"), True),
    ],
    ids=str,
)
def test_routing_is_the_twins(num_experts: int, routing: Routing, biased: bool) -> None:
    logits = torch.randn(9, num_experts)
    logits[3] = 1.0  # ties
    bias = torch.randn(num_experts) * 0.3 if biased else None
    out = moe_routing._launch_triton(logits, routing, bias)
    expected = moe_route(logits, routing, bias)
    assert torch.equal(out.expert_ids, expected.expert_ids)
    torch.testing.assert_close(out.weights, expected.weights, rtol=1e-5, atol=0)


def test_logits_of_nan_still_name_experts() -> None:
    logits = torch.full((1, 6), float("nan"))
    out = moe_routing._launch_triton(logits, Routing(top_k=2, renormalise=True), None)
    assert ((out.expert_ids >= 0) & (out.expert_ids < 6)).all()


def _check_alignment(aligned: moe_align.Aligned, expert_ids: torch.Tensor) -> None:
    """The contract: every pair once, among its expert's; tiles of one expert; padding."""
    size, num_pairs = aligned.tile_size, expert_ids.numel()
    num_padded = int(aligned.num_padded)
    assert num_padded % size == 0 and num_padded <= aligned.pairs.shape[0]
    assert aligned.pairs.shape[0] == aligned.max_tiles * size
    pairs = aligned.pairs[:num_padded].view(-1, size)
    experts = aligned.tile_experts[: num_padded // size]
    assert experts.tolist() == sorted(experts.tolist())
    assert sorted(p for p in pairs.flatten().tolist() if p < num_pairs) == list(range(num_pairs))
    assert pairs.max() <= num_pairs and (pairs < num_pairs).any(1).all()
    chosen = torch.cat((expert_ids.flatten(), torch.tensor([-1])))[pairs.long()]
    assert ((chosen == experts[:, None]) | (chosen == -1)).all()


@pytest.mark.parametrize("tile_size", [16, 64])
@pytest.mark.parametrize("num_tokens", [1, 5, 400])
@pytest.mark.parametrize("skewed", [True, False])
def test_alignment_keeps_the_contract(num_tokens: int, tile_size: int, skewed: bool) -> None:
    spread = torch.linspace(8, 0, 10) if skewed else torch.zeros(10)
    logits = torch.randn(num_tokens, 10) + spread
    expert_ids = moe_route(logits, Routing(top_k=3, renormalise=True)).expert_ids
    twin = moe_align.moe_align(expert_ids, tile_size, 10)
    out = moe_align._launch_triton(expert_ids, tile_size, 10)
    _check_alignment(twin, expert_ids)
    _check_alignment(out, expert_ids)
    assert torch.equal(out.pairs, twin.pairs)


def test_who_aligns_follows_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in moe_align._MODULES:  # not importable, whether or not vLLM is installed
        monkeypatch.setitem(sys.modules, name, None)
    assert moe_align.alignment("auto") is moe_align.moe_align
    with pytest.raises(ValueError, match="vLLM cannot be imported"):
        moe_align.alignment("vllm")
    with pytest.raises(ValueError, match="moe_align: 'sgl'; one of"):
        moe_align.alignment("sgl")
    theirs: Any = types.ModuleType("theirs")
    answer = torch.zeros(32, dtype=torch.int32), torch.zeros(2), torch.zeros(1)
    theirs.moe_align_block_size = lambda expert_ids, tile_size, num_experts: answer
    monkeypatch.setitem(sys.modules, moe_align._MODULES[0], theirs)
    for source in ("auto", "vllm"):
        aligned = moe_align.alignment(source)(torch.zeros(1, 1), 16, 4)
        assert aligned.pairs is answer[0] and aligned.max_tiles == 2
    assert moe_align.alignment("kvmesh") is moe_align.moe_align


def _experts(num_rows: int, width: int, form: str) -> WeightStack:
    values = torch.randn(NUM_EXPERTS, num_rows, width) * width**-0.5
    if form == "plain":
        return prepare_stack(values.half().float())
    if form == "channel":
        rows = quantise(values.flatten(0, 1))
        return prepare_stack(
            rows.values.view(values.shape), rows.scales.view(NUM_EXPERTS, num_rows)
        )
    scales = torch.rand(NUM_EXPERTS, num_rows // GROUP, width // GROUP) / 50 + 0.02
    return prepare_stack((values * 50).to(FP8), scales)


def _routed(num_tokens: int) -> Routed:
    logits = torch.randn(num_tokens, NUM_EXPERTS) * torch.linspace(3, 1, NUM_EXPERTS)
    return moe_route(logits, Routing(top_k=TOP_K, renormalise=True))


@pytest.mark.parametrize("inner", [256, 80])
@pytest.mark.parametrize("num_tokens", [1, 30, 200])
def test_plain_experts_give_what_the_twin_gives(num_tokens: int, inner: int) -> None:
    gate_up, down = _experts(2 * inner, HIDDEN, "plain"), _experts(HIDDEN, inner, "plain")
    x, routed = torch.randn(num_tokens, HIDDEN).half().float(), _routed(num_tokens)
    out = moe_launch.launch_moe(
        x, routed, gate_up, down, dtype=torch.float32, align=moe_align.moe_align
    )
    expected = moe_mlp(x, routed, gate_up, down, dtype=torch.float32)
    assert (out - expected).norm() < TOLERANCE * expected.norm()


def _stage_operands(
    form: str, num_tokens: int
) -> tuple[Routed, moe_align.Aligned, moe_launch._Sizes]:
    routed = _routed(num_tokens)
    sizes = moe_launch._sizes(num_tokens * TOP_K, NUM_EXPERTS)
    return routed, moe_align.moe_align(routed.expert_ids, sizes.tile_size, NUM_EXPERTS), sizes


FP8_CASES = [("channel", 256), ("channel", 80), ("block", 256)]


@pytest.mark.parametrize(("form", "inner"), FP8_CASES)
@pytest.mark.parametrize("num_tokens", [3, 60])
def test_fp8_rows_behind_silu_are_the_twins(form: str, inner: int, num_tokens: int) -> None:
    weight = _experts(2 * inner, HIDDEN, form)
    x = quantise(torch.randn(num_tokens, HIDDEN), GROUP if form == "block" else None)
    routed, aligned, sizes = _stage_operands(form, num_tokens)
    out = moe_launch._gate_up(x, weight, aligned, num_tokens * TOP_K, TOP_K, torch.float16, sizes)
    assert isinstance(out, Fp8Rows)
    for pair, expert in enumerate(routed.expert_ids.flatten().tolist()):
        row = x.dequantise(torch.float32)[pair // TOP_K]
        fed = silu_mul((weight.of(expert).dequantise() @ row).half()[None])
        expected = quantise(fed, GROUP)
        # fp16 rounds a sum in another order to a neighbour now and then.
        torch.testing.assert_close(out.scales[pair], expected.scales[0], rtol=2e-3, atol=0)
        wrong = bytes_of(out)[pair].int() - bytes_of(expected)[0].int()
        assert (wrong.abs() > 1).float().mean() <= 2 * INTERPRETER_WRONG_BYTES


@pytest.mark.parametrize(("form", "inner"), FP8_CASES)
@pytest.mark.parametrize("num_tokens", [3, 60])
def test_down_of_fp8_rows_is_the_twins(form: str, inner: int, num_tokens: int) -> None:
    weight = _experts(HIDDEN, inner, form)
    num_pairs = num_tokens * TOP_K
    fed = quantise(torch.randn(num_pairs, inner), GROUP)
    routed, aligned, sizes = _stage_operands(form, num_tokens)
    out = moe_launch._down(fed, weight, aligned, num_pairs, torch.float32, sizes)
    wide, expert_ids = fed.dequantise(torch.float32), routed.expert_ids.flatten().tolist()
    rows = [weight.of(e).dequantise() @ wide[pair] for pair, e in enumerate(expert_ids)]
    expected = torch.stack(rows)
    assert (out - expected).norm() < TOLERANCE * expected.norm()


def test_no_token_gives_no_row() -> None:
    gate_up, down = _experts(512, HIDDEN, "plain"), _experts(HIDDEN, 256, "plain")
    routed = Routed(expert_ids=torch.empty(0, 2, dtype=torch.int32), weights=torch.empty(0, 2))
    x = torch.empty(0, HIDDEN)
    for launch in (moe_mlp, moe_launch.launch_moe):
        out = launch(x, routed, gate_up, down, dtype=torch.float32, align=moe_align.moe_align)
        assert out.shape == (0, HIDDEN)
