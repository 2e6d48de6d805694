"""The row sampler at a real vocabulary: exact sets, exact ties, one result per row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine.gpu_sampler import GpuSampler
from engine.plan import SampleRequest, SamplingParams
from engine.sampler import LogitsError
from kernels import sampling
from kernels.sample_rows import launch_triton

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 151936
MASS_TOLERANCE = 1e-5  # fp32 sums of 151936 probabilities against float64
SCORE_TOLERANCE = 1e-4  # fp32 logarithms of the noise against float64

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.2},
    "one": {"top_k": 1},
    "top_k": {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
    "most on chip": {"top_k": 128, "temperature": 1.5},
    "wide top_k": {"top_k": 300},
    "wide top_k and top_p": {"top_k": 3000, "top_p": 0.9, "temperature": 1.2},
    "top_p": {"top_p": 0.9},
    "small top_p": {"top_p": 0.3},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.05},
    "all filters": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
    "hot": {"temperature": 2.0, "top_p": 0.5},
}


def request(seed: int, num_logprobs: int | None = None, **params: Any) -> SampleRequest:
    return SampleRequest(
        params=SamplingParams(**params), seeds=(seed,), position=77, num_logprobs=num_logprobs
    )


def logits_of(kind: str, num_rows: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[num_rows, VOCAB_SIZE] on the GPU: flat (normal) or peaked (a few tokens far ahead)."""
    generator = torch.Generator("cuda").manual_seed(num_rows)
    values = torch.randn(num_rows, VOCAB_SIZE, device="cuda", generator=generator)
    if kind == "peaked":
        likely = torch.randint(VOCAB_SIZE, (400,), device="cuda", generator=generator)
        values[:, likely] += torch.rand(num_rows, 400, device="cuda", generator=generator) * 14
    return values.to(dtype)


def check_draw(logits: torch.Tensor, row: SampleRequest, token: int) -> None:
    """token is kept by the filters and no kept token's score is better (float64 oracle)."""
    params = row.params
    wide = logits.double()
    order = torch.argsort(wide, descending=True, stable=True)
    if params.top_k > 0:
        order = order[: params.top_k]
    scaled = (wide[order] - wide.max()) / params.temperature
    mass = scaled.exp()
    before = (mass.cumsum(0) - mass) / mass.sum()
    surely = before < params.top_p - MASS_TOLERANCE
    maybe = before < params.top_p + MASS_TOLERANCE
    if params.min_p > 0.0:
        surely &= scaled >= math.log(params.min_p) + 1e-6
        maybe &= scaled >= math.log(params.min_p) - 1e-6
    maybe[0] = surely[0] = True
    place = (order == token).nonzero().flatten()
    assert len(place) == 1 and maybe[place], params
    hashes = sampling.token_hashes(VOCAB_SIZE, torch.device("cuda"))
    key = sampling.stream_key(row.seeds[0], row.position)
    score = scaled - sampling.gumbel_noise(hashes, [key])[0, order].double()
    assert score[place] > score[surely].max() - SCORE_TOLERANCE, params


@pytest.mark.parametrize("kind", ["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_mode_draws_the_best_of_what_it_keeps(kind: str, dtype: torch.dtype) -> None:
    rows = [request(seed, **mode) for mode in MODES.values() for seed in range(4)]
    logits = logits_of(kind, len(rows), dtype)
    for i, result in enumerate(GpuSampler(VOCAB_SIZE, 64, "cuda").sample(logits, rows)):
        assert not isinstance(result, LogitsError)
        check_draw(logits[i].float(), rows[i], result[0][0])


@pytest.mark.parametrize("num_rows", [1, 3, 64, 256])
def test_greedy_is_the_lowest_of_the_largest(num_rows: int) -> None:
    logits = logits_of("flat", num_rows).float().mul(8).round().div(8)  # tens of equals
    rows = [request(0, temperature=0.0)] * num_rows
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        sampler = GpuSampler(VOCAB_SIZE, num_rows, "cuda")
        sampler.sample(logits.to(dtype), rows)
        largest = logits.max(dim=1, keepdim=True).values
        ids = torch.arange(VOCAB_SIZE, device="cuda").expand(num_rows, -1)
        wanted = torch.where(logits == largest, ids, VOCAB_SIZE).amin(dim=1)
        assert torch.equal(sampler.tokens.long(), wanted)


def test_a_row_has_the_same_bits_alone_among_others_and_however_launched() -> None:
    modes = [*MODES.values(), {"temperature": 0.0}]
    rows = [request(i, (None, 0, 20)[i % 3], **modes[i % len(modes)]) for i in range(64)]
    logits = logits_of("peaked", 64)
    sampler = GpuSampler(VOCAB_SIZE, 64, "cuda")
    among = sampler.sample(logits, rows)
    for i in range(0, 64, 3):
        assert sampler.sample(logits[i : i + 1], [rows[i]]) == [among[i]], rows[i].params
    for tiles_per_part, pdl in ((1, False), (1, True), (2, False), (4, True)):
        prepared = sampler.prepare(rows)
        sampler.send(prepared)
        launch_triton(logits, sampler._buffers, 64, tiles_per_part=tiles_per_part, pdl=pdl)
        sampler.fetch(prepared)
        assert sampler.collect(prepared) == among


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 5},
        {"top_k": 200},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 150, "top_p": 0.7},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    num_draws, num_rows, vocab_size = 1 << 17, 1 << 14, 300
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(5)) * 1.5
    row = request(0, temperature=1.3, **params)
    sampler = GpuSampler(vocab_size, num_rows, "cuda")
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for start in range(0, num_draws, num_rows):
        seeds = tuple(range(start, start + num_rows))
        request_of_many = SampleRequest(params=row.params, seeds=seeds, position=9)
        sampler.sample(logits.cuda(), [request_of_many])
        counts += torch.bincount(sampler.tokens.cpu(), minlength=vocab_size)
    scaled = ((logits - logits.max()) / 1.3).clone()[0]
    sampling.filter_row(scaled, row.params.top_k, row.params.top_p, row.params.min_p)
    probs = torch.softmax(scaled.double(), 0)
    kept = probs > 0
    assert counts[~kept].sum() == 0
    expected = probs[kept] * num_draws
    num_free = int(kept.sum()) - 1
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    # Mean + 4 standard deviations of chi-square: the seeds are fixed, so this never flickers.
    assert statistic < num_free + 4 * math.sqrt(2 * num_free)


def test_a_captured_launch_serves_any_rows_of_its_bucket() -> None:
    sampler = GpuSampler(VOCAB_SIZE, 16, "cuda")
    eager = GpuSampler(VOCAB_SIZE, 16, "cuda")
    logits = logits_of("peaked", 16)
    sampler.sample(logits, [request(0)])  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.launch(logits, 16)
    modes = [{"temperature": 0.0}, *MODES.values(), {"frequency_penalty": 1.0}]
    for num_rows in (16, 5, 11):
        rows = [request(i + num_rows, i % 3, **modes[i % len(modes)]) for i in range(num_rows)]
        prepared = sampler.prepare(rows)
        sampler.send(prepared)
        graph.replay()
        sampler.fetch(prepared)
        assert sampler.collect(prepared) == eager.sample(logits, rows)


@pytest.mark.parametrize("mode", ["plain", "top_k", "top_p", "wide top_k and top_p"])
def test_bad_logits_are_flagged_alone(mode: str) -> None:
    logits = logits_of("flat", 4)
    rows = [request(i, 3, **MODES[mode]) for i in range(4)]
    sampler = GpuSampler(VOCAB_SIZE, 4, "cuda")
    whole = sampler.sample(logits, rows)
    logits[0, 5], logits[2, 151935] = math.nan, math.inf
    found = sampler.sample(logits, rows)
    assert [isinstance(result, LogitsError) for result in found] == [True, False, True, False]
    assert (found[1], found[3]) == (whole[1], whole[3])
