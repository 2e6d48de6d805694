"""The runner's arithmetic: transformers' tokens, and the same bits in any company."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engine.errors import ModelError
from engine.plan import Chunk, SampleRequest, SamplingParams
from engine.runner import ModelRunner
from tests.support.reference import greedy_tokens
from tests.support.tiny_models import FAMILIES, make_tiny_model

GREEDY = SamplingParams(temperature=0.0)


def load(path: Path, dtype: str = "fp32", block_tokens: int = 64) -> ModelRunner:
    """A runner with 16 MiB of KV."""
    torch.set_num_threads(1)
    return ModelRunner.load(
        path,
        device="cpu",
        dtype=dtype,
        kv_bytes=16 * 2**20,
        block_tokens=block_tokens,
        progress=lambda _: None,
    )


@pytest.fixture(scope="session", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    path = tmp_path_factory.mktemp(f"runner-{request.param}")
    make_tiny_model(request.param, path)
    return path


def hidden_states(runner: ModelRunner, chunks: list[Chunk]) -> torch.Tensor:
    """[num_tokens, hidden_size] of one step, chunk after chunk."""
    return torch.cat(runner.hidden_states(chunks))


def chunk(tokens: list[int], start: int, blocks: list[int]) -> Chunk:
    return Chunk(token_ids=tokens, start=start, blocks=blocks)


@pytest.mark.parametrize("num_prompt", [1, 63, 64, 65, 150])
def test_greedy_tokens_equal_transformers(model: Path, num_prompt: int) -> None:
    runner = load(model)
    rng = random.Random(num_prompt)
    prompt = [rng.randrange(256) for _ in range(num_prompt)]
    tokens, blocks = list(prompt), list(range(6))
    pending = list(prompt)
    for _ in range(24):
        request = SampleRequest(params=GREEDY, seeds=(0,), position=len(tokens))
        start = len(tokens) - len(pending)
        step = Chunk(token_ids=pending, start=start, blocks=blocks, sample=request)
        pending = list(runner.step([step])[0].token_ids)
        tokens += pending
    assert tokens[num_prompt:] == greedy_tokens(model, prompt, 24)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hidden_states_have_the_same_bits_in_any_company(model: Path, dtype: str) -> None:
    runner = load(model, dtype, block_tokens=16)
    rng = random.Random(5)
    tokens = [rng.randrange(256) for _ in range(70)]
    own = list(range(5))
    whole = hidden_states(runner, [chunk(tokens, 0, own)]).clone()
    for cut in (1, 15, 16, 17, 40, 69):
        first = hidden_states(runner, [chunk(tokens[:cut], 0, own)]).clone()
        rest = hidden_states(runner, [chunk(tokens[cut:], cut, own)])
        assert torch.equal(torch.cat((first, rest)), whole), f"chunk boundary at {cut}"
    one_by_one = [hidden_states(runner, [chunk([t], i, own)]) for i, t in enumerate(tokens)]
    assert torch.equal(torch.cat(one_by_one), whole), "token by token"
    others = [[rng.randrange(256) for _ in range(rng.randrange(1, 60))] for _ in range(9)]
    mates = [chunk(t, 0, list(range(5 + 4 * i, 9 + 4 * i))) for i, t in enumerate(others)]
    for place in (0, 4, 9):
        step = [*mates[:place], chunk(tokens, 0, own), *mates[place:]]
        start = sum(len(c.token_ids) for c in step[:place])
        mixed = hidden_states(runner, step)[start : start + len(tokens)]
        assert torch.equal(mixed, whole), f"prefill at place {place} among others"
    singles = [chunk([t[-1]], len(t) - 1, m.blocks) for t, m in zip(others, mates, strict=True)]
    for place in (0, 3, 9):
        step = [*singles[:place], chunk(tokens[-1:], 69, own), *singles[place:]]
        assert torch.equal(hidden_states(runner, step)[place], whole[-1]), "decode among others"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runner")
    make_tiny_model("qwen3", path)
    return path


@pytest.mark.parametrize(("dtype", "num_threads"), [("fp32", 1), ("bf16", 1), ("fp32", 2)])
def test_random_schedules_give_the_same_bits(qwen3: Path, dtype: str, num_threads: int) -> None:
    """Six sequences, up to 300 tokens (more than one pass of splits), cut and mixed at random."""
    runner = load(qwen3, dtype, block_tokens=16)
    torch.set_num_threads(num_threads)
    rng = random.Random(11)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (300, 270, 129, 64, 17, 1)]
    places = [list(range(i * 19, i * 19 + 19)) for i in range(6)]
    whole = [
        hidden_states(runner, [chunk(prompt, 0, blocks)])
        for prompt, blocks in zip(prompts, places, strict=True)
    ]
    num_computed = [0] * 6
    while pending := [i for i in range(6) if num_computed[i] < len(prompts[i])]:
        picked = rng.sample(pending, rng.randint(1, len(pending)))
        spans = {i: (num_computed[i], num_computed[i] + rng.choice((1, 1, 7, 50))) for i in picked}
        step = [chunk(prompts[i][slice(*spans[i])], spans[i][0], places[i]) for i in picked]
        for i, hidden in zip(picked, runner.hidden_states(step), strict=True):
            assert torch.equal(hidden, whole[i][slice(*spans[i])]), (i, spans[i])
            num_computed[i] = spans[i][0] + hidden.shape[0]


def test_nan_left_by_a_former_owner_changes_nothing(qwen3: Path) -> None:
    runner = load(qwen3, block_tokens=16)
    tokens = list(range(40))
    clean = hidden_states(runner, [chunk(tokens, 0, [0, 1, 2])])
    digests = runner.cache.digest([0, 1, 2])
    for start in (0, 16, 32):  # chunk boundaries, and token by token from there
        runner.cache.blocks.fill_(float("nan"))
        parts = [hidden_states(runner, [chunk(tokens[:start], 0, [7, 8, 9])])] if start else []
        parts += [hidden_states(runner, [chunk([t], t, [7, 8, 9])]) for t in tokens[start:]]
        assert torch.equal(torch.cat(parts), clean), start
        assert runner.cache.digest([7, 8, 9]) == digests


def test_prompt_logprobs_follow_the_chunks(qwen3: Path) -> None:
    runner = load(qwen3)
    tokens = [random.Random(2).randrange(256) for _ in range(100)]
    step = Chunk(
        token_ids=tokens,
        start=0,
        blocks=[0, 1],
        prompt_logprobs=2,
        next_token_ids=tokens[1:],
        sample=SampleRequest(params=GREEDY, seeds=(0, 1), position=100, num_logprobs=1),
    )
    result = runner.step([step])[0]
    assert len(result.token_ids) == 2 and len(result.prompt_logprobs) == 99
    assert [p.chosen.token_id for p in result.prompt_logprobs] == tokens[1:]
    assert all(len(p.top) == 2 for p in result.prompt_logprobs)
    first = Chunk(
        token_ids=tokens[:70],
        start=0,
        blocks=[2, 3],
        prompt_logprobs=2,
        next_token_ids=tokens[1:71],
    )
    assert runner.step([first])[0].prompt_logprobs == result.prompt_logprobs[:70]


def test_a_step_mixes_chunks_that_sample_with_chunks_that_do_not(qwen3: Path) -> None:
    runner = load(qwen3)
    request = SampleRequest(params=GREEDY, seeds=(0,), position=5)
    sampling = Chunk(token_ids=[1, 2, 3, 4, 5], start=0, blocks=[0], sample=request)
    alone = runner.step([sampling])[0]
    results = runner.step([chunk([9] * 20, 0, [1]), sampling, chunk([3], 0, [2])])
    assert [len(r.token_ids) for r in results] == [0, 1, 0] and results[1] == alone
    assert runner.step([]) == []


@pytest.mark.parametrize(
    ("token_ids", "start", "blocks"), [([1] * 65, 0, [0]), ([1], 64, [0]), ([], 0, [0])]
)
def test_chunks_that_do_not_fit_are_refused(
    qwen3: Path, token_ids: list[int], start: int, blocks: list[int]
) -> None:
    with pytest.raises(ValueError, match="limit 64"):
        load(qwen3).step([chunk(token_ids, start, blocks)])


def test_memory_is_checked_against_one_block(qwen3: Path) -> None:
    block_num_bytes = 2 * 2 * 2 * 64 * 16 * 4
    settings = {"device": "cpu", "dtype": "fp32", "block_tokens": 64}
    with pytest.raises(ModelError, match=rf"kv_bytes: 100;.*{block_num_bytes} bytes"):
        ModelRunner.load(qwen3, kv_bytes=100, **settings)
    runner = ModelRunner.load(qwen3, kv_bytes=3 * block_num_bytes + 5, **settings)
    assert runner.cache.num_blocks == 3 and runner.context_len == 192
    assert ModelRunner.load(qwen3, num_blocks=99, **settings).context_len == 1024
    with pytest.raises(ValueError, match="dtype: 'int4'"):
        ModelRunner.load(qwen3, num_blocks=1, device="cpu", dtype="int4")
