"""The device sampler around its kernel: packing, state across steps in flight, results."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import engine.gpu_sampler
from engine.gpu_sampler import GpuSampler, PreparedRows
from engine.plan import PositionLogprobs, SampleRequest, SamplingParams
from engine.sampler import LogitsError, Sampled, Sampler
from kernels.sample_rows import launch_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB_SIZE = 203

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "tiny temperature": {"temperature": 1e-6},
    "top_k": {"top_k": 20},
    "whole top_k": {"top_k": 5000},
    "top_p": {"top_p": 0.7, "temperature": 1.5},
    "min_p": {"min_p": 0.05},
    "all filters": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7, "temperature": 0.0},
    "repetition": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": ((3, 5.0), (9, -100.0))},
    "allowed": {"allowed_token_ids": (5, 6, 70, 202), "logit_bias": ((5, 2.0), (7, 9.0))},
    "bad": {"bad_token_ids": tuple(range(0, 200, 3)), "top_p": 0.5},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["public", "kernel"])
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through a launch: as dispatched, and by the kernel (interpreted without a GPU)."""
    if request.param == "kernel":
        monkeypatch.setattr(engine.gpu_sampler, "sample_rows", launch_triton)


def row(seed: int = 1, position: int = 30, **changes: Any) -> SampleRequest:
    fields = {"seeds", "masked_token_ids", "num_logprobs", "prompt_token_ids", "output_token_ids"}
    own = {name: changes.pop(name) for name in fields & changes.keys()}
    base = SampleRequest(params=SamplingParams(**changes), seeds=(seed,), position=position)
    return replace(base, **own)


def normal(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def sampler(max_rows: int = 64) -> GpuSampler:
    return GpuSampler(VOCAB_SIZE, max_rows, DEVICE, block=64)


def begin(device: GpuSampler, logits: torch.Tensor, rows: list[SampleRequest]) -> PreparedRows:
    """A step up to its results: they are on their way."""
    prepared = device.prepare(rows)
    device.send(prepared)
    device.launch(logits.to(DEVICE), prepared.num_rows)
    device.fetch(prepared)
    return prepared


def same(left: Sampled | LogitsError, right: Sampled | LogitsError) -> bool:
    """Equal tokens, ranks and alternatives; log probabilities within fp32."""
    assert not isinstance(left, LogitsError) and not isinstance(right, LogitsError)
    pairs = zip(map(flat, left[1]), map(flat, right[1]), strict=True)
    return left[0] == right[0] and all(
        a[:2] == b[:2] and (a[2] == b[2] or abs(a[2] - b[2]) < 1e-5)
        for tops in pairs
        for a, b in zip(*tops, strict=True)
    )


def flat(position: PositionLogprobs) -> list[tuple[int, int, float]]:
    return [(t.token_id, t.rank, t.logprob) for t in (position.chosen, *position.top)]


def test_every_mode_samples_what_the_host_sampler_samples() -> None:
    tokens: dict[str, Any] = {"prompt_token_ids": [1, 2, 3, 80], "output_token_ids": [4, 4, 5]}
    rows = [
        row(
            seed,
            7,
            seeds=(seed, 2**64 - 1 - seed),
            num_logprobs=(None, 0, 5)[seed],
            **mode,
            **tokens,
        )
        for mode in MODES.values()
        for seed in range(3)
    ]
    logits = normal(len(rows))
    found = sampler(128).sample(logits.to(DEVICE), rows)
    wanted = Sampler(VOCAB_SIZE, "cpu").sample(logits, rows)
    assert all(map(same, found, wanted))


def test_rows_may_read_any_row_of_logits_and_tell_their_places() -> None:
    logits = normal(5)
    device = sampler()
    rows = [row(temperature=0.0), row(seeds=(1, 2, 3), temperature=0.0), row(temperature=0.0)]
    prepared = device.prepare(rows, [4, 0, 2])
    device.send(prepared)
    device.launch(logits.to(DEVICE), num_rows=64)
    device.fetch(prepared)
    best = logits.argmax(dim=1).tolist()
    assert prepared.places == (0, 1, 4)
    assert device.tokens[:5].tolist() == [best[4], best[0], best[0], best[0], best[2]]
    assert [r[0] for r in device.collect(prepared) if not isinstance(r, LogitsError)] == [
        (best[4],),
        (best[0],) * 3,
        (best[2],),
    ]


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("mode", ["presence", "frequency", "repetition"])
def test_penalties_count_tokens_that_the_host_does_not_know_yet(mode: str) -> None:
    device, host = sampler(), Sampler(VOCAB_SIZE, "cpu")
    logits = normal(1) * 0.1
    prompt, outputs, wanted = [1, 2, 2], [5], [5]
    base = row(3, prompt_token_ids=prompt, **MODES[mode])
    flights: list[PreparedRows] = []
    for step in range(5):
        known = replace(base, output_token_ids=list(wanted), position=4 + step)
        wanted.append(host.sample(logits, [known])[0][0][0])
        pending = replace(
            base, output_token_ids=outputs, position=4 + step, num_pending=len(flights)
        )
        flights.append(begin(device, logits, [pending]))
        if len(flights) == 2:
            (result,) = device.collect(flights.pop(0))
            assert not isinstance(result, LogitsError)
            outputs.extend(result[0])
    assert outputs == wanted[:-1]


def test_a_token_that_was_sampled_and_forgotten_is_not_counted() -> None:
    device, host = sampler(), Sampler(VOCAB_SIZE, "cpu")
    logits = normal(1) * 0.1
    request = row(prompt_token_ids=[1], output_token_ids=[5, 6], frequency_penalty=2.0)
    request = replace(request, position=3)
    first = device.collect(begin(device, logits, [request]))
    again = device.collect(begin(device, logits, [request]))
    assert first == again
    assert same(first[0], host.sample(logits, [request])[0])


def test_only_the_request_whose_logits_are_bad_gets_an_error() -> None:
    logits = normal(3)
    logits[1, 200] = math.nan
    rows = [row(i, num_logprobs=1) for i in range(3)]
    first, bad, last = sampler().sample(logits.to(DEVICE), rows)
    assert isinstance(bad, LogitsError)
    kept = Sampler(VOCAB_SIZE, "cpu").sample(logits[[0, 2]], [rows[0], rows[2]])
    assert same(first, kept[0]) and same(last, kept[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"masked_token_ids": frozenset({3, 1}), "temperature": 0.0},
        {"masked_token_ids": frozenset(range(VOCAB_SIZE))},
        {"allowed_token_ids": (7, 3), "masked_token_ids": frozenset({3, 7})},
        {"allowed_token_ids": (7, 3), "bad_token_ids": (3,), "masked_token_ids": frozenset({7})},
    ],
)
def test_masked_tokens_are_barred_and_something_always_stays(changes: dict[str, Any]) -> None:
    logits = normal(2)
    rows = [row(2, num_logprobs=4, **changes), row(num_logprobs=4)]
    found = sampler().sample(logits.to(DEVICE), rows)
    assert all(map(same, found, Sampler(VOCAB_SIZE, "cpu").sample(logits, rows)))


def test_steps_in_flight_do_not_share_memory() -> None:
    device = sampler()
    logits = [normal(2, seed) for seed in range(3)]
    rows = [row(temperature=0.0), row(temperature=0.0)]
    flights = [begin(device, values, rows) for values in logits]
    for flight, values in zip(flights, logits, strict=True):
        tokens = [r[0][0] for r in device.collect(flight) if not isinstance(r, LogitsError)]
        assert tokens == values.argmax(dim=1).tolist()


def test_what_belongs_to_requests_that_are_gone_is_given_up() -> None:
    device = sampler()
    logits = normal(1)
    states = device._buffers.states
    for i in range(100):
        begin(device, logits, [row(i, output_token_ids=[], presence_penalty=1.0, position=0)])
        assert len(states) <= 70
    for i in range(100):
        begin(device, logits, [row(i, logit_bias=((1, 1.0),))])
        assert len(states) <= 70
    for _ in range(70):
        begin(device, logits, [row()])
    assert not states


def test_more_kinds_of_requests_than_there_is_room_for_at_first() -> None:
    device = sampler(256)
    logits = normal(1).expand(200, -1).contiguous()
    rows = [row(temperature=0.0, logit_bias=((i, 100.0),)) for i in range(200)]
    found = device.sample(logits.to(DEVICE), rows)
    assert [r[0][0] for r in found if not isinstance(r, LogitsError)] == list(range(200))


def test_prompt_logprobs_are_those_of_the_host_sampler() -> None:
    logits = normal(70, seed=4)
    token_ids = [(i * 37) % VOCAB_SIZE for i in range(70)]
    host, device = Sampler(VOCAB_SIZE, "cpu"), sampler()
    for num_top in (0, 3):
        found = device.prompt_logprobs(logits.to(DEVICE), token_ids, num_top)
        wanted = host.prompt_logprobs(logits, token_ids, num_top)
        assert same(((), tuple(found)), ((), tuple(wanted)))
    assert device.prompt_logprobs(logits[:0], [], 3) == []
    with pytest.raises(LogitsError):
        device.prompt_logprobs(torch.full((1, VOCAB_SIZE), math.nan, device=DEVICE), [1], 3)


def test_what_does_not_fit_is_refused() -> None:
    device = sampler(2)
    with pytest.raises(ValueError, match="rows: 3"):
        device.prepare([row(seeds=(1, 2, 3))])
    with pytest.raises(ValueError, match="num_logprobs: 21"):
        device.prepare([row(num_logprobs=21)])
    with pytest.raises(ValueError, match="masked_token_ids"):
        device.prepare([row(masked_token_ids=frozenset(range(1000)))])
    assert device.sample(normal(1)[:0], []) == []
