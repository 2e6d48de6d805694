"""Sampling: order of operations, independence of neighbours, and the distribution itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.plan import SampleRequest, SamplingParams
from engine.sampler import LogitsError, Sampler

VOCAB_SIZE = 1003

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 2.0},
    "tiny temperature": {"temperature": 1e-6},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.7, "temperature": 1.5},
    "min_p": {"min_p": 0.05},
    "all filters": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7, "temperature": 0.0},
    "repetition": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": ((3, 5.0), (9, -100.0))},
    "allowed": {"allowed_token_ids": (5, 6, 700, 1002)},
    "bad": {"bad_token_ids": tuple(range(0, 900, 3)), "top_p": 0.5},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def request(seed: int = 1, position: int = 30, **changes: Any) -> SampleRequest:
    fields = {"seeds", "masked_token_ids", "num_logprobs", "prompt_token_ids", "output_token_ids"}
    own = {name: changes.pop(name) for name in fields & changes.keys()}
    base = SampleRequest(params=SamplingParams(**changes), seeds=(seed,), position=position)
    return replace(base, **own)


def logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def sample_one(values: list[float], **changes: Any) -> int:
    sampler = Sampler(len(values), "cpu")
    return sampler.sample(torch.tensor([values]), [request(**changes)])[0][0][0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", [0, 7, 15])
def test_a_row_is_bit_equal_alone_and_among_fifteen_others(mode: str, place: int) -> None:
    sampler = Sampler(VOCAB_SIZE, "cpu")
    values = logits(16)
    tokens: dict[str, Any] = {"prompt_token_ids": [1, 2, 3, 800], "output_token_ids": [4, 4, 5]}
    others = [
        request(seed, 10 + seed, num_logprobs=seed % 3 or None, **params, **tokens)
        for seed, params in enumerate([*MODES.values(), *MODES.values()][:16])
    ]
    for seed in range(8):
        row = request(seed, seeds=(seed, seed + 9), num_logprobs=5, **MODES[mode], **tokens)
        alone = sampler.sample(values[place : place + 1].clone(), [row])[0]
        among = sampler.sample(values, [*others[:place], row, *others[place + 1 :]])[place]
        assert alone == among


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    sampler = Sampler(VOCAB_SIZE, "cpu")
    values = logits(1)
    draws = {
        (seed, position): sampler.sample(values, [request(seed, position, temperature=2.0)])[0][0]
        for seed in (0, 1, 2**64 - 1)
        for position in (1, 2, 100_000)
    }
    again = sampler.sample(values, [request(2**64 - 1, 2, temperature=2.0)])[0][0]
    assert draws[2**64 - 1, 2] == again
    assert len(set(draws.values())) >= 8


def test_several_seeds_draw_what_each_would_alone() -> None:
    sampler = Sampler(VOCAB_SIZE, "cpu")
    values = logits(1)
    together = sampler.sample(values, [request(seeds=tuple(range(16)))])[0][0]
    assert together == tuple(sampler.sample(values, [request(s)])[0][0][0] for s in range(16))


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert sample_one([0.0, 2.0, 2.0, -0.0], temperature=0.0) == 1
    assert sample_one([-0.0, 0.0], temperature=0.0) == 0
    assert sample_one([1.0, 1.0], top_k=1) == 0
    assert sample_one([1.0, 3.0, 3.0, 3.0], top_p=1e-6) == 1


def test_input_logits_are_left_alone() -> None:
    values = logits(3)
    before = values.clone()
    rows = [
        request(**MODES[mode], output_token_ids=[1]) for mode in ("bias", "allowed", "presence")
    ]
    Sampler(VOCAB_SIZE, "cpu").sample(values, rows)
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"logit_bias": ((0, 10.0),)}, 0),
        ({"allowed_token_ids": (1, 2)}, 2),
        ({"bad_token_ids": (3,)}, 2),
        ({"masked_token_ids": frozenset({3, 2})}, 1),
        ({"allowed_token_ids": (0, 3), "bad_token_ids": (3,)}, 0),
        ({"presence_penalty": 1.5, "output_token_ids": [3]}, 2),
        ({"presence_penalty": 1.5, "prompt_token_ids": [3]}, 3),
        ({"frequency_penalty": 0.6, "output_token_ids": [3]}, 3),
        ({"frequency_penalty": 0.6, "output_token_ids": [3, 3]}, 2),
        ({"repetition_penalty": 2.0, "prompt_token_ids": [3]}, 2),
        ({"repetition_penalty": 2.0, "output_token_ids": [3, 3]}, 2),
    ],
)
def test_adjustments_move_the_greedy_choice(changes: dict[str, Any], expected: int) -> None:
    assert sample_one([0.0, 1.0, 2.0, 3.0], temperature=0.0, **changes) == expected


def test_repetition_penalty_pushes_negative_logits_down() -> None:
    row = request(temperature=0.0, repetition_penalty=2.0, prompt_token_ids=[0], num_logprobs=2)
    (_, (position,)) = Sampler(2, "cpu").sample(torch.tensor([[-1.0, -1.5]]), [row])[0]
    assert position.chosen.token_id == 1
    assert position.top[1].logprob - position.top[0].logprob == pytest.approx(-0.5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"allowed_token_ids": (3, 2), "masked_token_ids": frozenset({2, 3})}, 2),
        ({"allowed_token_ids": (3, 2), "bad_token_ids": (2,), "masked_token_ids": {3}}, 3),
        ({"bad_token_ids": (0, 1, 2, 3)}, 0),
    ],
)
def test_when_everything_is_barred_the_lowest_allowed_token_stays(
    temperature: float, changes: dict[str, Any], expected: int
) -> None:
    changes = {**changes, "masked_token_ids": frozenset(changes.get("masked_token_ids", ()))}
    assert sample_one([0.0] * 4, temperature=temperature, **changes) == expected


def test_infinities_and_nan() -> None:
    inf = math.inf
    assert sample_one([-inf, -inf, 0.0, -inf]) == 2
    assert sample_one([-inf] * 3) == 0
    assert sample_one([0.0, -inf, -inf], top_k=2, top_p=0.5) == 0
    for bad in (math.nan, inf):
        with pytest.raises(LogitsError, match="row 0"):
            sample_one([0.0, bad, 1.0], temperature=0.0)
    with pytest.raises(ValueError, match="shape"):
        Sampler(4, "cpu").sample(torch.zeros(1, 3), [request()])


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 1e-4])
def test_a_tiny_temperature_is_greedy_in_the_limit(temperature: float) -> None:
    assert {sample_one([1.0, 5.0, 4.0], seed=s, temperature=temperature) for s in range(20)} == {1}


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0
    return float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())


def keep_top_k(probs: torch.Tensor) -> torch.Tensor:
    return probs * (probs >= probs.sort(descending=True).values[4])


def keep_top_p(probs: torch.Tensor) -> torch.Tensor:
    ordered, order = probs.sort(descending=True)
    kept = ordered * (ordered.cumsum(0) - ordered < 0.8)
    return torch.zeros_like(probs).scatter(0, order, kept)


def keep_min_p(probs: torch.Tensor) -> torch.Tensor:
    return probs * (probs >= 0.1 * probs.max())


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        ({}, lambda probs: probs),
        ({"top_k": 5}, keep_top_k),
        ({"top_k": 500}, lambda probs: probs),
        ({"top_p": 0.8}, keep_top_p),
        ({"min_p": 0.1}, keep_min_p),
    ],
)
@pytest.mark.parametrize("varies", ["seed", "position"])
def test_draws_follow_the_distribution(
    changes: dict[str, Any], keep: Callable[[torch.Tensor], torch.Tensor], varies: str
) -> None:
    num_draws, vocab_size, temperature = 20_000, 24, 1.3
    values = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(5)) * 1.5
    probs = keep(torch.softmax(values[0].double() / temperature, 0))
    sampler = Sampler(vocab_size, "cpu")
    row = request(temperature=temperature, **changes)
    if varies == "seed":
        tokens = sampler.sample(values, [replace(row, seeds=tuple(range(num_draws)))])[0][0]
    else:
        rows = [replace(row, position=i) for i in range(num_draws)]
        tokens = [t[0] for t, _ in sampler.sample(values.expand(num_draws, -1), rows)]
    counts = torch.bincount(torch.tensor(tokens), minlength=vocab_size).double()
    statistic = chi_square(counts, probs / probs.sum() * num_draws)
    num_free = int((probs > 0).sum()) - 1
    # Mean + 4 standard deviations of chi-square: the seeds are fixed, so this never flickers.
    assert statistic < num_free + 4 * math.sqrt(2 * num_free)


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    vocab_size, num_draws = 4096, 50_000
    values = torch.zeros(1, vocab_size)
    values[0, 17] = 8.0
    tokens = Sampler(vocab_size, "cpu").sample(
        values, [request(seeds=tuple(range(num_draws // 10)))]
    )[0][0]
    share = sum(token == 17 for token in tokens) / len(tokens)
    expected = math.exp(8) / (math.exp(8) + vocab_size - 1)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(tokens))


def test_logprobs_are_those_before_temperature_with_ties_by_lowest_id() -> None:
    values = torch.tensor([[1.0, 2.0, 2.0, -1.0, 2.0]])
    row = request(seed=3, temperature=0.5, top_k=1, num_logprobs=4)
    (ids, (position,)) = Sampler(5, "cpu").sample(values, [row])[0]
    wanted = torch.log_softmax(values[0].double(), 0)
    assert ids == (1,)
    assert (position.chosen.token_id, position.chosen.rank) == (1, 0)
    assert [(t.token_id, t.rank) for t in position.top] == [(1, 0), (2, 1), (4, 2), (0, 3)]
    for top in position.top:
        assert top.logprob == pytest.approx(wanted[top.token_id].item(), abs=1e-6)


def test_prompt_logprobs_name_token_rank_and_alternatives() -> None:
    values = logits(6, seed=4)
    sampler = Sampler(VOCAB_SIZE, "cpu")
    token_ids = [0, 5, 1002, 500, 7, 8]
    found = sampler.prompt_logprobs(values, token_ids, 3)
    wanted = torch.log_softmax(values.double(), -1)
    for i, position in enumerate(found):
        chosen = position.chosen
        assert chosen.token_id == token_ids[i]
        assert chosen.logprob == pytest.approx(wanted[i, token_ids[i]].item(), abs=1e-5)
        assert chosen.rank == int((values[i] > values[i, token_ids[i]]).sum())
        assert [t.token_id for t in position.top] == values[i].topk(3).indices.tolist()
    assert found[2:3] == sampler.prompt_logprobs(values[2:3], token_ids[2:3], 3)
    assert all(position.top == () for position in sampler.prompt_logprobs(values, token_ids, 0))
    assert sampler.prompt_logprobs(values[:0], [], 3) == []
    assert len(sampler.prompt_logprobs(values[:1], [1], 5000)[0].top) == VOCAB_SIZE
