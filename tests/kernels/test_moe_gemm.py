"""Experts' feed-forward: the sum the formula says, the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from kernels.fp8_quant import FP8, GROUP, Fp8Rows, Quantise, quantise
from kernels.moe_gemm import moe_mlp
from kernels.moe_routing import Routed, Routing, moe_route
from kernels.weight_stack import WeightStack, prepare_stack

NUM_EXPERTS, HIDDEN, INNER, TOP_K = 6, 128, 256, 3
FORMATS: dict[str, tuple[torch.dtype, Quantise | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "channel": (torch.bfloat16, "token"),
    "block": (torch.bfloat16, "group"),
}


@pytest.fixture(autouse=True, params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.param)


def _experts(num_rows: int, width: int, form: str) -> WeightStack:
    values = torch.randn(NUM_EXPERTS, num_rows, width) * width**-0.5
    dtype, kind = FORMATS[form]
    if kind is None:
        return prepare_stack(values.to(dtype))
    if kind == "token":
        rows = quantise(values.flatten(0, 1))
        made = rows.values.view(values.shape), rows.scales.view(NUM_EXPERTS, num_rows)
        return prepare_stack(*made)
    scales = torch.rand(NUM_EXPERTS, num_rows // GROUP, width // GROUP) / 50 + 0.02
    return prepare_stack((values * 50).to(FP8), scales)


def _routed(num_tokens: int) -> Routed:
    logits = torch.randn(num_tokens, NUM_EXPERTS) * torch.linspace(3, 1, NUM_EXPERTS)
    return moe_route(logits, Routing(top_k=TOP_K, renormalise=True))


def _run(
    x: torch.Tensor, routed: Routed, gate_up: WeightStack, down: WeightStack, form: str
) -> torch.Tensor:
    dtype, kind = FORMATS[form]
    rows: torch.Tensor | Fp8Rows = x.to(dtype)
    if kind is not None:
        rows = quantise(x.to(dtype), GROUP if kind == "group" else None)
    return moe_mlp(rows, routed, gate_up, down, dtype=dtype)


@pytest.mark.parametrize(("form", "limit"), [("fp32", 1e-6), ("bf16", 0.01), ("channel", 0.06)])
def test_the_result_is_the_weighted_sum_of_its_experts(form: str, limit: float) -> None:
    gate_up, down = _experts(2 * INNER, HIDDEN, form), _experts(HIDDEN, INNER, form)
    x, routed = torch.randn(20, HIDDEN), _routed(20)
    out = _run(x, routed, gate_up, down, form)
    expected = torch.zeros(20, HIDDEN, dtype=torch.float64)
    for token in range(20):
        pairs = zip(routed.expert_ids[token], routed.weights[token], strict=True)
        for expert, weight in pairs:
            wide, narrow = (w.of(int(expert)).dequantise().double() for w in (gate_up, down))
            gate, up = (wide @ x[token].double()).chunk(2)
            expected[token] += weight.double() * (narrow @ (torch.nn.functional.silu(gate) * up))
    # Rounding of the activations: none, 8 bits, 4 bits.
    assert (out.double() - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("form", FORMATS)
def test_a_tokens_bits_do_not_depend_on_the_others(form: str) -> None:
    gate_up, down = _experts(2 * INNER, HIDDEN, form), _experts(HIDDEN, INNER, form)
    x, routed = torch.randn(90, HIDDEN), _routed(90)
    whole = _run(x, routed, gate_up, down, form)
    for chosen in ([0], [89], [3, 4], list(range(17)), list(range(20, 90)), [5, 80, 7, 5, 33]):
        part = Routed(expert_ids=routed.expert_ids[chosen], weights=routed.weights[chosen])
        assert torch.equal(_run(x[chosen], part, gate_up, down, form), whole[chosen]), chosen


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scales \[5\]"):
        prepare_stack(torch.zeros(2, 8, 16).to(FP8), torch.ones(2, 5))


def test_rows_of_another_format_are_refused() -> None:
    gate_up, down = _experts(2 * INNER, HIDDEN, "channel"), _experts(HIDDEN, INNER, "channel")
    x, routed = torch.randn(2, 2 * GROUP), _routed(2)
    with pytest.raises(ValueError, match="x with 2 scales a row for experts .* take 1"):
        moe_mlp(quantise(x, GROUP), routed, gate_up, down, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="x of torch.float32 for experts of torch.float8"):
        moe_mlp(x, routed, gate_up, down, dtype=torch.bfloat16)
    plain = _experts(2 * INNER, HIDDEN, "bf16")
    with pytest.raises(ValueError, match="take none"):
        moe_mlp(quantise(x), routed, plain, down, dtype=torch.bfloat16)
