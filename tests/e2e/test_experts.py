"""Mixtures of experts through the mesh: seeds, FP8, and a resume after a rank's death.

Their greedy tokens are compared with transformers' in test_tokens.py, as every family's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protos import gateway_pb2
from tests.support.generate import (
    Answer,
    generate,
    generate_through_a_kill,
    greedy_request,
    sampled_request,
)
from tests.support.mesh import Mesh, running_mesh
from tests.support.reference import greedy_tokens
from tests.support.tiny_models import make_tiny_model

PROMPT_LENS = (1, 5, 31, 63, 64, 65, 130, 200)
NUM_TOKENS = 40


def _prompts() -> list[list[int]]:
    rng = random.Random(6)
    return [[rng.randrange(256) for _ in range(n)] for n in PROMPT_LENS]


def _together(mesh: Mesh, requests: list[gateway_pb2.GenerateRequest]) -> list[Answer]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: generate(mesh, request), requests))


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts, without and with latent attention."""
    path = tmp_path_factory.mktemp("experts")
    make_tiny_model(request.param, path)
    return path


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[Mesh]:
    """Two decode ranks, so that one may die."""
    with running_mesh(model, num_decode=2) as mesh:
        yield mesh


def test_sampled_tokens_do_not_depend_on_batch_mates(mesh: Mesh) -> None:
    requests = [sampled_request(p, NUM_TOKENS, seed) for seed, p in enumerate(_prompts())]
    alone = [generate(mesh, request).tokens[0] for request in requests]
    for request, tokens, answer in zip(requests, alone, _together(mesh, requests), strict=True):
        assert answer.tokens[0] == tokens, f"seed {request.sampling.seed}"
    other = sampled_request(_prompts()[3], NUM_TOKENS, seed=99)
    assert generate(mesh, other).tokens[0] != alone[3], "the seed changes nothing"


def test_fp8_experts_give_the_same_tokens_alone_in_company_and_from_the_store(model: Path) -> None:
    requests = [greedy_request(prompt, NUM_TOKENS) for prompt in _prompts()]
    with running_mesh(model, worker_flags=("--dtype", "fp8")) as mesh:
        alone = [generate(mesh, request) for request in requests]
        together = _together(mesh, requests)
    for prompt, one, other in zip(_prompts(), alone, together, strict=True):
        assert one.tokens == other.tokens, f"prompt of {len(prompt)} tokens"
        assert other.usage is not None
        assert other.usage.num_cached_tokens == (len(prompt) - 1) // 64 * 64
    exact = [greedy_tokens(model, prompt, NUM_TOKENS) for prompt in _prompts()]
    assert [one.tokens[0] for one in alone] != exact, "nothing was quantised"


def test_a_killed_decode_rank_loses_and_doubles_no_token(mesh: Mesh) -> None:
    request = sampled_request(list(range(100, 180)), 400, seed=5)
    expected = generate(mesh, request).tokens[0]
    assert generate_through_a_kill(mesh, request, after=30).tokens[0] == expected
