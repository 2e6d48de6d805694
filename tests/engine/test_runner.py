"""The runner's arithmetic: transformers' tokens, and the same bits in any company."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engine.decoder import Batch
from engine.plan import Chunk, SampleRequest, SamplingParams
from engine.runner import ModelRunner
from tests.support.reference import greedy_tokens
from tests.support.tiny_models import make_tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
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
    """[num_tokens, hidden_size] of one step."""
    with torch.inference_mode():
        batch: Batch = runner._batch(chunks)
        return runner._decoder.forward(batch, runner.cache.blocks)


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
