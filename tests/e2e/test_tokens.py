"""The mesh's tokens equal transformers', alone, in company, and when every prefix comes from the
store.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.generate import generate, greedy_request, sampled_request
from tests.support.mesh import Mesh, running_mesh
from tests.support.reference import greedy_tokens

# Shorter than a block, on and around block boundaries, many blocks long (a block is 64 tokens).
PROMPT_LENS = (1, 2, 5, 17, 31, 47, 62, 63, 64, 65, 66, 90, 127, 128, 129, 192, 200, 256, 320, 400)
NUM_TOKENS = 64
VOCAB_SIZE = 256


def _prompts() -> list[list[int]]:
    rng = random.Random(20)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in PROMPT_LENS]


def test_greedy_tokens_equal_transformers(family_mesh: Mesh) -> None:
    prompts = _prompts()
    expected = [greedy_tokens(family_mesh.model, prompt, NUM_TOKENS) for prompt in prompts]
    requests = [greedy_request(prompt, NUM_TOKENS) for prompt in prompts]

    for prompt, request, tokens in zip(prompts, requests, expected, strict=True):
        answer = generate(family_mesh, request)
        assert answer.tokens[0] == tokens, f"prompt of {len(prompt)} tokens, alone"

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda request: generate(family_mesh, request), requests))
    for prompt, answer, tokens in zip(prompts, answers, expected, strict=True):
        assert answer.tokens[0] == tokens, f"prompt of {len(prompt)} tokens, 16 at once"
        # All that can come from the store did: every full block before the last token.
        assert answer.usage is not None
        assert answer.usage.num_cached_tokens == (len(prompt) - 1) // 64 * 64


def test_sampled_tokens_do_not_depend_on_batch_mates(wide_mesh: Mesh) -> None:
    prompts = _prompts()[2:18]
    requests = [sampled_request(prompt, 48, seed) for seed, prompt in enumerate(prompts)]
    alone = [generate(wide_mesh, request).tokens[0] for request in requests]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda request: generate(wide_mesh, request), requests))
    for prompt, tokens, answer in zip(prompts, alone, together, strict=True):
        assert len(tokens) == 48
        assert answer.tokens[0] == tokens, f"prompt of {len(prompt)} tokens"


def test_a_prefix_written_by_one_prefill_serves_the_other(wide_mesh: Mesh) -> None:
    rng = random.Random(7)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(300)]
    before = [wide_mesh.status(p.address).counts.num_steps for p in wide_mesh.prefills]
    answers = [generate(wide_mesh, greedy_request(prompt, 4)) for _ in range(6)]
    after = [wide_mesh.status(p.address).counts.num_steps for p in wide_mesh.prefills]
    assert all(b > a for a, b in zip(before, after, strict=True)), "one prefill took no work"
    assert answers[0].usage is not None and answers[0].usage.num_cached_tokens == 0
    for answer in answers[1:]:
        assert answer.usage is not None and answer.usage.num_cached_tokens == 256
        assert answer.tokens == answers[0].tokens


def test_forked_sequences_equal_their_own_runs(wide_mesh: Mesh) -> None:
    prompt = _prompts()[13]
    request = sampled_request(prompt, 40, seed=11)
    request.sampling.num_sequences = 4
    first, again = generate(wide_mesh, request), generate(wide_mesh, request)
    assert first.tokens == again.tokens and sorted(first.tokens) == [0, 1, 2, 3]
    assert len({tuple(tokens) for tokens in first.tokens.values()}) > 1
    single = generate(wide_mesh, sampled_request(prompt, 40, seed=11))
    assert single.tokens[0] == first.tokens[0]


def test_fp8_weights_and_kv_give_the_same_tokens_alone_in_company_and_from_the_store(
    tiny_model: Path,
) -> None:
    flags = ("--dtype", "fp8", "--kv-dtype", "fp8")
    prompts = _prompts()[8:18]
    requests = [greedy_request(prompt, 40) for prompt in prompts]
    with running_mesh(tiny_model, num_decode=2, worker_flags=flags) as mesh:
        alone = [generate(mesh, request) for request in requests]
        with ThreadPoolExecutor(len(requests)) as pool:
            together = list(pool.map(lambda request: generate(mesh, request), requests))
    for prompt, one, other in zip(prompts, alone, together, strict=True):
        assert one.tokens == other.tokens, f"prompt of {len(prompt)} tokens"
        assert other.usage is not None
        assert other.usage.num_cached_tokens == (len(prompt) - 1) // 64 * 64
    exact = [greedy_tokens(tiny_model, prompt, 40) for prompt in prompts]
    assert [one.tokens[0] for one in alone] != exact, "nothing was quantised"
