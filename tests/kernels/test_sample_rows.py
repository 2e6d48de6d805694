"""The row sampler's kernel (interpreted without a GPU) against its twin and a float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine.gpu_sampler import GpuSampler
from engine.plan import SampleRequest, SamplingParams
from kernels import sampling
from kernels.sample_format import SampleBuffers, Status
from kernels.sample_rows import launch_triton, sample_rows

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB_SIZE = 1003
BLOCK = 256  # 4 tiles

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 2.0},
    "tiny temperature": {"temperature": 1e-6},
    "top_k": {"top_k": 20},
    "one": {"top_k": 1, "temperature": 2.0},
    "wide top_k": {"top_k": 400, "temperature": 2.0},
    "top_p": {"top_p": 0.7, "temperature": 1.5},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.05, "temperature": 2.0},
    "all filters": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
    "wide top_k and top_p": {"top_k": 300, "top_p": 0.8, "temperature": 3.0},
    "widest top_k and top_p": {"top_k": 800, "top_p": 0.9, "temperature": 9.0},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7, "temperature": 0.0},
    "repetition": {"repetition_penalty": 1.3, "top_p": 0.9},
    "bias": {"logit_bias": ((3, 5.0), (9, -100.0))},
    "allowed": {"allowed_token_ids": (5, 6, 700, 1002)},
    "bad": {"bad_token_ids": tuple(range(0, 900, 3)), "top_p": 0.5},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def request(seed: int = 1, num_logprobs: int | None = None, **params: Any) -> SampleRequest:
    return SampleRequest(
        params=SamplingParams(**params),
        seeds=(seed,),
        position=7,
        prompt_token_ids=[1, 2, 3, 800],
        output_token_ids=[4, 4, 5],
        num_logprobs=num_logprobs,
    )


def normal(num_rows: int, *, seed: int = 0, step: float = 0.0) -> torch.Tensor:
    """Logits [num_rows, VOCAB_SIZE]; with a step they are multiples of it, so that many tie."""
    values = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    return (values / step).round() * step if step else values


class Launched:
    """What a launch left: of the twin on the host, or of the kernel."""

    def __init__(
        self,
        logits: torch.Tensor,
        rows: list[SampleRequest],
        logits_rows: list[int] | None = None,
        *,
        twin: bool = False,
        tiles_per_part: int = 1,
    ) -> None:
        sampler = GpuSampler(logits.shape[1], 64, "cpu" if twin else DEVICE, block=BLOCK)
        prepared = sampler.prepare(rows, logits_rows)
        sampler.send(prepared)
        buffers: SampleBuffers = sampler._buffers
        if twin:
            sample_rows(logits, buffers, prepared.num_rows)
        else:
            values = logits.to(DEVICE)
            launch_triton(values, buffers, prepared.num_rows, tiles_per_part=tiles_per_part)
        num_rows = prepared.num_rows
        self.tokens = buffers.tokens[:num_rows].tolist()
        self.status = buffers.report[:num_rows, 1].tolist()
        self.report = buffers.report[:num_rows].cpu()
        self.top = buffers.top[:num_rows].cpu()
        self.logprobs = self.report.view(torch.float32)[:, 2]
        assert not buffers.counters.any()


def kept_tokens(logits: torch.Tensor, params: SamplingParams) -> list[int]:
    """Float64 oracle: the kept tokens of logits [vocab_size] in their order."""
    wide = logits.double()
    order = sorted(range(len(wide)), key=lambda i: (-wide[i].item(), i))
    if params.top_k > 0:
        order = order[: params.top_k]
    scaled = (wide[order] - wide.max()) / params.temperature
    mass = scaled.exp()
    before = mass.cumsum(0) - mass
    kept = (before < params.top_p * mass.sum()) | (torch.arange(len(order)) == 0)
    if params.min_p > 0.0:
        kept &= scaled >= math.log(params.min_p)
    return [order[i] for i in kept.nonzero().flatten()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_kernel_agrees_with_the_twin(dtype: torch.dtype) -> None:
    logits = normal(3).to(dtype)
    rows = [request(i, (None, 0, 5)[i % 3], **params) for i, params in enumerate(MODES.values())]
    logits_rows = [i % 3 for i in range(len(rows))]
    twin = Launched(logits, rows, logits_rows, twin=True)
    kernel = Launched(logits, rows, logits_rows)
    assert kernel.tokens == twin.tokens
    assert torch.equal(kernel.report[:, 3], twin.report[:, 3])
    assert torch.equal(kernel.top[:, :, 0], twin.top[:, :, 0])
    assert torch.allclose(kernel.logprobs, twin.logprobs, atol=1e-5)
    assert torch.allclose(
        kernel.top[:, :, 1].contiguous().view(torch.float32),
        twin.top[:, :, 1].contiguous().view(torch.float32),
        atol=1e-5,
    )


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "ties"])
def test_draws_are_the_best_of_exactly_what_the_filters_keep(step: float) -> None:
    logits = normal(1, seed=3, step=step).to(torch.bfloat16 if step else torch.float32)
    modes = [m for m in MODES.values() if m.keys() <= {"temperature", "top_k", "top_p", "min_p"}]
    rows = [request(seed, **m) for m in modes if m.get("temperature") != 0.0 for seed in range(2)]
    tokens = Launched(logits, rows, [0] * len(rows)).tokens
    logits = logits.float()
    hashes = sampling.token_hashes(VOCAB_SIZE, torch.device("cpu"))
    for row, token in zip(rows, tokens, strict=True):
        kept = kept_tokens(logits[0], row.params)
        noise = sampling.gumbel_noise(hashes, [sampling.stream_key(row.seeds[0], row.position)])[0]
        wide = logits[0, kept].double() / row.params.temperature - noise[kept].double()
        assert token == kept[int(wide.argmax())], row.params


def test_a_row_has_the_same_bits_alone_among_others_and_however_tiles_are_dealt() -> None:
    logits = normal(4, seed=8)
    modes = ("greedy", "top_k", "wide top_k and top_p", "repetition")
    rows = [request(i, 3, **MODES[mode]) for i, mode in enumerate(modes)]
    among = Launched(logits, rows)
    dealt = Launched(logits, rows, tiles_per_part=2)
    assert torch.equal(among.report, dealt.report)
    assert torch.equal(among.top, dealt.top)
    for i, row in enumerate(rows):
        alone = Launched(logits[i : i + 1], [row])
        assert torch.equal(alone.report[0], among.report[i]), modes[i]
        assert torch.equal(alone.top[0], among.top[i]), modes[i]


@pytest.mark.parametrize("tiles_per_part", [1, 4])
def test_greedy_takes_the_lowest_of_equals(tiles_per_part: int) -> None:
    logits = torch.full((3, VOCAB_SIZE), -1.0)
    logits[0, [300, 301, 900]] = 2.0
    logits[1, [255, 256]] = 0.0
    logits[1, 255] = -0.0
    logits[2] = -0.0
    logits[2, 700] = 0.0
    rows = [request(temperature=0.0)] * 3
    assert Launched(logits, rows, tiles_per_part=tiles_per_part).tokens == [300, 255, 0]


@pytest.mark.parametrize("mode", ["greedy", "plain", "top_k", "top_p", "presence"])
def test_nan_and_infinity_are_flagged_and_spoil_no_other_row(mode: str) -> None:
    logits = normal(4)
    whole = Launched(logits, [request(i, 2, **MODES[mode]) for i in range(4)])
    logits[0, 600] = math.nan
    logits[2, 1002] = math.inf
    logits[3, 5] = -math.nan
    spoilt = Launched(logits, [request(i, 2, **MODES[mode]) for i in range(4)])
    assert spoilt.status == [Status.BAD, 0, Status.BAD, Status.BAD]
    assert torch.equal(spoilt.report[1], whole.report[1])


def test_a_row_of_nothing_possible_falls_back() -> None:
    logits = normal(2)
    logits[1] = -math.inf
    rows = [
        request(allowed_token_ids=(9, 8), bad_token_ids=(8, 9)),
        request(temperature=0.0),
        request(bad_token_ids=(0,)),
    ]
    found = Launched(logits, rows, [0, 1, 1])
    assert found.status == [Status.EMPTY] * 3
    assert found.tokens == [8, 0, 0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 1e-4])
def test_a_tiny_temperature_is_greedy_in_the_limit(temperature: float) -> None:
    logits = normal(1)
    logits[0, 77] = 20.0
    rows = [request(seed, temperature=temperature) for seed in range(4)]
    assert Launched(logits, rows, [0] * 4).tokens == [77] * 4


def test_wrong_shapes_are_refused() -> None:
    buffers = SampleBuffers.allocate(8, 2, torch.device("cpu"))
    for logits, num_rows in ((torch.zeros(2, 7), 2), (torch.zeros(2, 8), 3), (torch.zeros(8), 1)):
        with pytest.raises(ValueError, match="logits|num_rows"):
            sample_rows(logits, buffers, num_rows)
