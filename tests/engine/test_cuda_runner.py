"""The GPU runner on a CPU, over the kernels' twins: tokens, pipelining, passes, what is refused."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.cuda_graphs import GraphBuckets, GraphPool, bucket_sizes
from engine.cuda_runner import CudaRunner
from engine.cuda_step import CudaStep
from engine.plan import UNKNOWN_TOKEN, Chunk, ChunkResult, SampleRequest, SamplingParams
from engine.prompt_graphs import MAX_PROMPTS, MAX_ROWS, prompt_sizes
from engine.runner import ModelRunner
from engine.runners import RunnerOptions, load_cuda_runner
from engine.sampler import LogitsError
from tests.support.tiny_models import FAMILIES, LATENT_FAMILIES, make_tiny_model

GREEDY = SamplingParams(temperature=0.0)
BLOCK_TOKENS = 16


@pytest.fixture(scope="session", params=[f for f in FAMILIES if f not in LATENT_FAMILIES])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    path = tmp_path_factory.mktemp(f"cuda-{request.param}")
    make_tiny_model(request.param, path)
    return path


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda")
    make_tiny_model("qwen3", path)
    return path


def load(path: Path, max_batch: int = 4, graphs: bool = True) -> CudaRunner:
    torch.set_num_threads(1)
    options = RunnerOptions(
        dtype="fp32",
        num_blocks=60,
        block_tokens=BLOCK_TOKENS,
        max_batch=max_batch,
        chunk_tokens=64,
        graphs=graphs,
    )
    return load_cuda_runner(path, device="cpu", options=options)


def chunk(
    tokens: list[int],
    start: int,
    blocks: list[int],
    prompt_len: int,
    follows: int | None = None,
    seeds: tuple[int, ...] = (0,),
) -> Chunk:
    """A chunk that samples greedily behind its last token."""
    position = start + len(tokens)
    sample = SampleRequest(params=GREEDY, seeds=seeds, position=position)
    return Chunk(
        token_ids=tokens,
        start=start,
        blocks=blocks[: (position - 1) // BLOCK_TOKENS + 1],
        sample=sample,
        follows=follows,
        prompt_len=prompt_len,
    )


def prompts(num_prompts: int) -> list[list[int]]:
    rng = random.Random(num_prompts)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, 40))] for _ in range(num_prompts)]


def blocks_of(number: int) -> list[int]:
    """Blocks of sequence `number`, room for 96 tokens."""
    return list(range(number * 6, number * 6 + 6))


def expected(path: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens by the CPU runner."""
    runner = ModelRunner.load(path, dtype="fp32", num_blocks=6, block_tokens=BLOCK_TOKENS)
    tokens, output = prompt, list[int]()
    for _ in range(num_tokens):
        start = len(prompt) + len(output) - len(tokens)
        output += runner.step([chunk(tokens, start, list(range(6)), len(prompt))])[0].token_ids
        tokens = output[-1:]
    return output


def pipelined(runner: CudaRunner, texts: list[list[int]], num_steps: int) -> list[list[int]]:
    """Steps launched one ahead: tokens of the step before are never known. Shuffled every time."""
    rng = random.Random(1)
    order = list(range(len(texts)))
    outputs: list[list[int]] = [[] for _ in texts]
    landing: tuple[CudaStep, list[int]] | None = None
    for step in range(num_steps):
        place = {number: i for i, number in enumerate(order)}
        rng.shuffle(order)
        chunks: list[Chunk] = []
        for number in order:
            text, blocks = texts[number], blocks_of(number)
            if step == 0:
                chunks.append(chunk(text, 0, blocks, len(text)))
            else:
                start, follows = len(text) + step - 1, place[number]
                chunks.append(chunk([UNKNOWN_TOKEN], start, blocks, len(text), follows))
        launched = runner.launch(chunks, landing[0] if landing else None)
        if landing:
            take(runner.results(landing[0]), landing[1], outputs)
        landing = launched, list(order)
    assert landing is not None
    take(runner.results(landing[0]), landing[1], outputs)
    return outputs


def take(results: list[ChunkResult], order: list[int], outputs: list[list[int]]) -> None:
    for number, result in zip(order, results, strict=True):
        outputs[number] += result.token_ids


def test_tokens_are_those_of_the_cpu_runner(model: Path) -> None:
    texts = prompts(5)
    outputs = pipelined(load(model, max_batch=5), texts, 20)
    assert outputs == [expected(model, text, 20) for text in texts]


def test_a_graph_step_and_a_step_of_kernels_agree(qwen3: Path) -> None:
    texts = prompts(3)
    assert pipelined(load(qwen3), texts, 12) == pipelined(load(qwen3, graphs=False), texts, 12)


def test_recomputed_outputs_are_cut_into_passes(qwen3: Path) -> None:
    """40 output positions at once on a runner of 16 rows, beside a prompt."""
    text = prompts(1)[0][:7]
    outputs = expected(qwen3, text, 41)
    runner = load(qwen3)
    whole = chunk(text + outputs[:40], 0, blocks_of(0), len(text))
    other = chunk([3, 4, 5], 0, blocks_of(1), 3)
    result = runner.step([other, whole, other])
    assert result[1].token_ids == (outputs[40],) and result[0] == result[2]
    hidden = runner.hidden_states([whole])[0]
    single = runner.hidden_states([chunk(outputs[39:40], 46, blocks_of(0), len(text))])[0]
    assert hidden.shape == (47, 64) and torch.allclose(hidden[-1:], single, rtol=1e-4, atol=1e-4)


def test_a_resumed_sequence_samples_behind_its_last_output(qwen3: Path) -> None:
    """Prompt and outputs in one pass: its prompt's last row must not be taken for its last."""
    text = prompts(1)[0][:7]
    outputs = expected(qwen3, text, 9)
    runner = load(qwen3)
    for count in (1, 5, 8):
        whole = chunk(text + outputs[:count], 0, blocks_of(0), len(text))
        assert runner.step([whole])[0].token_ids == (outputs[count],)


def test_many_seeds_take_several_launches(qwen3: Path) -> None:
    runner = load(qwen3)
    one = chunk([1, 2, 3], 0, blocks_of(0), 3, seeds=(0, 1, 2))
    step = [one, *(chunk([i], 0, blocks_of(i), 1, seeds=tuple(range(9))) for i in (1, 2))]
    results = runner.step(step)
    assert [len(result.token_ids) for result in results] == [3, 9, 9]
    assert runner.step([one])[0].token_ids == results[0].token_ids


def test_prompt_logprobs_are_those_of_the_cpu_runner(qwen3: Path) -> None:
    tokens = [random.Random(3).randrange(256) for _ in range(50)]
    step = Chunk(
        token_ids=tokens,
        start=0,
        blocks=blocks_of(0),
        prompt_logprobs=2,
        next_token_ids=tokens[1:],
        prompt_len=50,
    )
    made = load(qwen3).step([step])[0].prompt_logprobs
    reference = ModelRunner.load(qwen3, dtype="fp32", num_blocks=6, block_tokens=BLOCK_TOKENS)
    for one, other in zip(made, reference.step([step])[0].prompt_logprobs, strict=True):
        assert one.chosen.token_id == other.chosen.token_id
        assert one.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)
        assert [t.token_id for t in one.top] == [t.token_id for t in other.top]


def test_rows_that_hold_nan_fail_the_step(qwen3: Path) -> None:
    runner = load(qwen3)
    runner.step([chunk([1, 2], 0, blocks_of(0), 2)])
    runner.cache.blocks[0].fill_(float("nan"))
    with pytest.raises(LogitsError):
        runner.step([chunk([3], 2, blocks_of(0), 2)])


@pytest.mark.parametrize(
    ("token_ids", "start", "blocks"), [([1] * 17, 0, [0]), ([1], 16, [0]), ([], 0, [0])]
)
def test_chunks_that_do_not_fit_are_refused(
    qwen3: Path, token_ids: list[int], start: int, blocks: list[int]
) -> None:
    with pytest.raises(ValueError, match="limit 16"):
        load(qwen3).step([Chunk(token_ids=token_ids, start=start, blocks=blocks)])


def test_a_step_says_what_it_took(qwen3: Path) -> None:
    runner = load(qwen3)
    step = runner.launch([chunk([1, 2], 0, blocks_of(0), 2)], None)
    runner.results(step)
    assert step.is_done and step.forward_s > 0 and step.sample_s > 0


def test_batches_run_in_the_smallest_graph_that_holds_them() -> None:
    assert [bucket_sizes(n) for n in (1, 3, 8)] == [[1], [1, 2, 4], [1, 2, 4, 8]]
    assert bucket_sizes(20) == [1, 2, 4, 8, 16, 24]
    assert bucket_sizes(300)[-4:] == [248, 256, 288, 320]
    ran: list[int] = []
    pool = GraphPool(torch.device("cpu"))
    graphs = GraphBuckets("decode steps", bucket_sizes(20), ran.append, pool)
    for num_rows in (1, 3, 5, 17, 24):
        graphs.replay(graphs.size_for(num_rows))
    assert ran == [1, 4, 8, 24, 24] and graphs.largest == 24


def test_prompts_run_in_graphs_little_larger_than_they_are() -> None:
    assert prompt_sizes(1) == prompt_sizes(64) == [64]
    assert prompt_sizes(200) == [64, 128, 192, 256]
    assert prompt_sizes(2048)[-3:] == [1536, 1792, 2048]
    sizes = prompt_sizes(8192)
    assert sizes[-1] == MAX_ROWS
    assert all(3 * small >= 2 * large for small, large in pairwise(sizes) if small >= 128)


@pytest.mark.parametrize("num_prompts", [1, 5, MAX_PROMPTS, MAX_PROMPTS + 1])
def test_prompts_together_in_a_graph_are_those_alone(model: Path, num_prompts: int) -> None:
    """More than a graph takes run kernel by kernel, with the same bits."""
    runner, plain = load(model), load(model, graphs=False)
    texts = [[(7 * n + i) % 256 for i in range(1 + n % 3)] for n in range(num_prompts)]
    chunks = [chunk(text, 0, [n], len(text)) for n, text in enumerate(texts)]
    assert runner.step(chunks) == plain.step(chunks)
    together = runner.hidden_states(chunks)
    for number, alone in enumerate(chunks):
        assert torch.equal(runner.hidden_states([alone])[0], together[number]), number
