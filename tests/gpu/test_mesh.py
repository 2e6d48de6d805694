"""A whole mesh on one GPU: blocks go from prefill to decode through the store's device memory."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.gpu.engine_case import run_engine
from engine.runners import RunnerOptions, load_cuda_runner
from tests.support.generate import TIMEOUT_S, Answer, generate, greedy_request, sampled_request
from tests.support.mesh import Mesh, running_mesh

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
LENGTHS = (1, 63, 64, 65, 130, 200, 320, 400)
NUM_TOKENS = 48
FLAGS = ("--device", "cuda", "--max-batch", "16", "--chunk-tokens", "256")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One prefill, two decode ranks, one store, all on the first GPU."""
    with running_mesh(
        DEMO, num_decode=2, worker_flags=FLAGS, store_flags=("--device", "cuda")
    ) as mesh:
        yield mesh


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 2000) for _ in range(length)] for length in LENGTHS]


def test_the_mesh_gives_the_tokens_of_the_engine_alone_and_from_the_store(mesh: Mesh) -> None:
    options = RunnerOptions(num_blocks=200, max_batch=16, chunk_tokens=256)
    runner = load_cuda_runner(DEMO, options=options)
    expected = run_engine(runner, prompts(), NUM_TOKENS, max_batch=16, chunk_tokens=256).outputs
    requests = [greedy_request(prompt, NUM_TOKENS) for prompt in prompts()]
    for request, tokens in zip(requests, expected, strict=True):
        assert generate(mesh, request).tokens[0] == tokens
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: generate(mesh, request), requests))
    for prompt, answer, tokens in zip(prompts(), answers, expected, strict=True):
        assert answer.tokens[0] == tokens, f"prompt of {len(prompt)} tokens"
        assert answer.usage is not None
        assert answer.usage.num_cached_tokens == (len(prompt) - 1) // 64 * 64


def test_a_rank_killed_mid_stream_costs_no_token(mesh: Mesh) -> None:
    requests = [sampled_request(prompt, 200, seed) for seed, prompt in enumerate(prompts())]
    expected = [generate(mesh, request).tokens[0] for request in requests]

    def run(request: object) -> list[int]:
        answer = Answer()
        for response in mesh.generation.Generate(request, timeout=TIMEOUT_S):
            answer.add(response)
        return answer.tokens[0]

    with ThreadPoolExecutor(len(requests)) as pool:
        running = [pool.submit(run, request) for request in requests]
        victim = mesh.decodes[0]
        mesh.wait_until(
            lambda: mesh.status(victim.address).counts.num_sequences > 0, "a rank decodes"
        )
        victim.popen.send_signal(signal.SIGKILL)
        assert [future.result() for future in running] == expected
