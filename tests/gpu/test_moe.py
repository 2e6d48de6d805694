"""A mixture of experts on a GPU at Qwen3-30B-A3B's layer shape: values, and bits of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.plan import Chunk
from engine.runner import ModelRunner
from engine.runners import RunnerOptions, load_cuda_runner
from kernels.fp8_quant import FP8, GROUP, Fp8Rows, quantise
from kernels.moe_align import Aligned, alignment, moe_align
from kernels.moe_gemm import _moe_torch, moe_mlp
from kernels.moe_routing import Routed, Routing, _route_torch, moe_route
from kernels.weight_stack import WeightStack, prepare_stack
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

NUM_EXPERTS, TOP_K, HIDDEN, INNER = 64, 8, 2048, 768
FORMS = ("plain", "channel", "block")
# bf16 rounding; e4m3 rounding of rows that differ by a bf16 rounding.
LIMITS = {"plain": 5e-3, "channel": 2e-2, "block": 2e-2}
V3 = Routing(
    top_k=8,
    renormalise=True,
    scoring="sigmoid",
    num_groups=8,
    top_groups=4,
    group_score="top2",
    scale=2.5,
)


def experts(num_rows: int, width: int, form: str) -> WeightStack:
    values = torch.randn(NUM_EXPERTS, num_rows, width, device="cuda") * width**-0.5
    if form == "plain":
        return prepare_stack(values.bfloat16())
    if form == "channel":
        rows = quantise(values.flatten(0, 1))
        return prepare_stack(
            rows.values.view(values.shape), rows.scales.view(NUM_EXPERTS, num_rows)
        )
    shape = NUM_EXPERTS, num_rows // GROUP, width // GROUP
    scales = torch.rand(shape, device="cuda") / 50 + 0.02
    return prepare_stack((values * 50).to(FP8), scales)


def rows_of(x: torch.Tensor, form: str) -> torch.Tensor | Fp8Rows:
    return x if form == "plain" else quantise(x, GROUP if form == "block" else None)


def inputs(num_tokens: int) -> tuple[torch.Tensor, Routed]:
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(num_tokens, NUM_EXPERTS, device="cuda") * 2
    return x, moe_route(logits, Routing(top_k=TOP_K, renormalise=True))


@pytest.fixture(scope="module", params=FORMS)
def layer(request: pytest.FixtureRequest) -> tuple[str, WeightStack, WeightStack]:
    """(format, gate and up, down)."""
    torch.manual_seed(0)
    form = request.param
    return form, experts(2 * INNER, HIDDEN, form), experts(HIDDEN, INNER, form)


@pytest.mark.parametrize("routing", [Routing(top_k=8, renormalise=True), V3], ids=str)
@pytest.mark.parametrize("num_experts", [64, 256])
def test_routing_is_the_twins(num_experts: int, routing: Routing) -> None:
    logits = torch.randn(500, num_experts, device="cuda", dtype=torch.bfloat16).float()
    logits += torch.arange(num_experts, device="cuda") * 1e-4  # no near ties
    bias = torch.rand(num_experts, device="cuda") if routing is V3 else None
    out, twin = moe_route(logits, routing, bias), _route_torch(logits, routing, bias)
    same = (out.expert_ids == twin.expert_ids).all(1)
    assert same.float().mean() > 0.99  # exp has an ulp of its own
    torch.testing.assert_close(out.weights[same], twin.weights[same], rtol=1e-5, atol=0)
    for start, stop in ((0, 1), (7, 24), (100, 499)):
        part = moe_route(logits[start:stop], routing, bias)
        assert torch.equal(part.expert_ids, out.expert_ids[start:stop])
        assert torch.equal(part.weights, out.weights[start:stop])


def pairs_by_tile(aligned: Aligned, num_pairs: int) -> dict[int, list[int]]:
    """Pairs of each expert, in ascending order."""
    num_padded, size = int(aligned.num_padded), aligned.tile_size
    found: dict[int, list[int]] = {}
    for tile in range(num_padded // size):
        part = aligned.pairs[tile * size : (tile + 1) * size].tolist()
        found.setdefault(int(aligned.tile_experts[tile]), []).extend(
            pair for pair in part if pair < num_pairs
        )
    return {expert: sorted(pairs) for expert, pairs in found.items()}


@pytest.mark.parametrize("tile_size", [16, 64, 128])
@pytest.mark.parametrize("num_tokens", [1, 33, 4096])
def test_alignment_is_vllms_and_the_twins(num_tokens: int, tile_size: int) -> None:
    _, routed = inputs(num_tokens)
    ours = moe_align(routed.expert_ids, tile_size, NUM_EXPERTS)
    twin = moe_align(routed.expert_ids.cpu(), tile_size, NUM_EXPERTS)
    assert torch.equal(ours.pairs.cpu(), twin.pairs)
    theirs = alignment("auto")(routed.expert_ids, tile_size, NUM_EXPERTS)
    assert int(theirs.num_padded) == int(ours.num_padded)
    num_pairs = num_tokens * TOP_K
    assert pairs_by_tile(theirs, num_pairs) == pairs_by_tile(ours, num_pairs)


@pytest.mark.parametrize("num_tokens", [1, 16, 300, 2000])
def test_the_kernels_are_near_the_twin(
    layer: tuple[str, WeightStack, WeightStack], num_tokens: int
) -> None:
    form, gate_up, down = layer
    x, routed = inputs(num_tokens)
    rows = rows_of(x, form)
    out = moe_mlp(rows, routed, gate_up, down, dtype=torch.bfloat16)
    twin = _moe_torch(rows, routed, gate_up, down, torch.bfloat16)
    error = (out.float() - twin.float()).norm() / twin.float().norm()
    assert error < LIMITS[form]


def test_a_tokens_bits_do_not_depend_on_the_others(
    layer: tuple[str, WeightStack, WeightStack],
) -> None:
    """Tiles of 16, 64 and 128 tokens: whatever the number of tokens makes of them."""
    form, gate_up, down = layer
    x, routed = inputs(3000)
    whole = moe_mlp(rows_of(x, form), routed, gate_up, down, dtype=torch.bfloat16)
    for chosen in ([0], [2999, 5], range(17), range(100, 164), range(50, 550), range(1, 2500)):
        ids = list(chosen)
        part = Routed(expert_ids=routed.expert_ids[ids], weights=routed.weights[ids])
        out = moe_mlp(rows_of(x[ids], form), part, gate_up, down, dtype=torch.bfloat16)
        assert torch.equal(out, whole[ids]), len(ids)


def test_a_graph_replays_other_routes(layer: tuple[str, WeightStack, WeightStack]) -> None:
    form, gate_up, down = layer
    x, routed = inputs(32)
    rows = rows_of(x, form)

    def call() -> torch.Tensor:
        return moe_mlp(rows, routed, gate_up, down, dtype=torch.bfloat16)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    _, other = inputs(32)
    routed.expert_ids.copy_(other.expert_ids)
    routed.weights.copy_(other.weights)
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, call())


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_an_engine_gives_the_same_bits_whatever_the_chunks(tmp_path: Path, dtype: str) -> None:
    make_tiny_model(
        "qwen3_moe",
        tmp_path,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        head_dim=64,
    )
    options = RunnerOptions(dtype=dtype, num_blocks=64, max_batch=32, chunk_tokens=512)
    runner = load_cuda_runner(tmp_path, options=options)
    tokens = torch.randint(0, 256, (300,)).tolist()

    def hidden(cuts: list[int]) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
            chunk = Chunk(
                token_ids=tokens[start:stop], start=start, blocks=list(range(8)), prompt_len=300
            )
            parts += [part.cpu().float() for part in runner.hidden_states([chunk])]
        return torch.cat(parts)

    whole = hidden([])
    for cuts in ([1], [64, 65], [17, 100, 299]):
        assert torch.equal(hidden(cuts), whole), cuts
    exact = ModelRunner.load(tmp_path, dtype="fp32", num_blocks=8).hidden_states(
        [Chunk(token_ids=tokens, start=0, blocks=list(range(8)))]
    )[0]
    distances = (whole - exact).norm(dim=1) / exact.norm(dim=1)
    assert distances.median() < 0.25  # a router near a tie chooses another expert for a few tokens
