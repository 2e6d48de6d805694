"""The engine on a GPU: near the CPU's arithmetic, and the same bits in any company."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.engine_case import run_engine
from engine.cuda_runner import CudaRunner
from engine.plan import Chunk, SampleRequest, SamplingParams
from engine.runner import ModelRunner
from engine.runners import RunnerOptions, load_cuda_runner
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
# Large enough for whole tiles of every kernel and whole blocks of scales.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SAMPLING = SamplingParams(temperature=0.9, top_p=0.95, presence_penalty=0.2)
TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face "
    "of the waters. And God said, Let there be light: and there was light. And God saw the light, "
    "that it was good: and God divided the light from the darkness. And God called the light Day, "
    "and the darkness he called Night. And the evening and the morning were the first day."
)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of each family."""
    path = tmp_path_factory.mktemp(f"gpu-{request.param}")
    sizes = SIZES if request.param == "qwen2" else {**SIZES, "head_dim": 64}
    make_tiny_model(request.param, path, **sizes)
    return path


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    make_tiny_model("qwen3", path, **SIZES, head_dim=64)
    return path


def load(path: Path, dtype: str = "bf16", num_blocks: int = 400, **options: Any) -> CudaRunner:
    options = {"max_batch": 32, "chunk_tokens": 512, **options}
    made = RunnerOptions(dtype=dtype, num_blocks=num_blocks, **options)
    return load_cuda_runner(path, options=made)


def prompts(num_prompts: int) -> list[list[int]]:
    rng = random.Random(num_prompts)
    lengths = [1, 2, 63, 64, 65, 300, *(rng.randrange(1, 400) for _ in range(num_prompts))]
    return [[rng.randrange(256) for _ in range(n)] for n in lengths[:num_prompts]]


def hidden(runner: CudaRunner | ModelRunner, tokens: list[int], cuts: list[int]) -> torch.Tensor:
    """[num_tokens, hidden_size] on the CPU, of a prompt computed in chunks that end at cuts."""
    parts: list[torch.Tensor] = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        chunk = Chunk(
            token_ids=tokens[start:stop],
            start=start,
            blocks=list(range(8)),
            prompt_len=len(tokens),
        )
        parts += [part.cpu().float() for part in runner.hidden_states([chunk])]
    return torch.cat(parts)


def error(made: torch.Tensor, reference: torch.Tensor) -> float:
    return float((made - reference).norm() / reference.norm())


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 2e-2), ("bf16", 0.1)])
def test_hidden_states_are_near_the_cpu(model: Path, dtype: str, limit: float) -> None:
    """Operands have 11 bits (fp32 goes through TF32) or 8, over two layers of large weights."""
    tokens = prompts(6)[5]
    reference = ModelRunner.load(model, dtype="fp32", num_blocks=8)
    exact = hidden(reference, tokens, [])
    runner = load(model, dtype)
    assert error(hidden(runner, tokens, []), exact) < limit
    singles = [Chunk(token_ids=[t], start=i, blocks=list(range(8))) for i, t in enumerate(tokens)]
    decoded = torch.cat([runner.hidden_states([chunk])[0].cpu() for chunk in singles]).float()
    assert error(decoded, exact) < limit


def test_greedy_tokens_are_those_of_the_cpu(model: Path) -> None:
    """fp32 on both, through TF32 on the GPU: near ties differ, and then all that follows."""
    reference = ModelRunner.load(model, dtype="fp32", num_blocks=100)
    texts = prompts(6)
    expected = run_engine(reference, texts, 16, max_batch=8, chunk_tokens=512).outputs
    made = run_engine(load(model, "fp32"), texts, 16, max_batch=8, chunk_tokens=512).outputs
    assert sum(one == other for one, other in zip(made, expected, strict=True)) >= 3


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("bf16", "auto"), ("fp8", "auto"), ("fp8", "fp8")])
@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "sampled"])
def test_tokens_depend_on_nothing_but_the_request(
    qwen3: Path, dtype: str, kv_dtype: str, sampling: SamplingParams | None
) -> None:
    texts = prompts(24)
    run = partial(run_engine, num_outputs=40, sampling=sampling)
    runner = load(qwen3, dtype, kv_dtype=kv_dtype)
    expected = run(runner, texts, max_batch=32, chunk_tokens=512).outputs
    assert len({tuple(output) for output in expected}) > 12, "the outputs hardly differ"
    assert run(runner, texts, max_batch=32, chunk_tokens=70).outputs == expected, "other chunks"
    assert run(runner, texts, max_batch=7, chunk_tokens=512).outputs == expected, "other batches"
    # Seeds are numbers of sequences: only the first keeps its seed alone.
    assert run(runner, texts[:1]).outputs == expected[:1], "alone"
    plain = load(qwen3, dtype, kv_dtype=kv_dtype, graphs=False, pdl=False)
    assert run(plain, texts, max_batch=32, chunk_tokens=512).outputs == expected, "without graphs"
    tight = load(qwen3, dtype, num_blocks=30, kv_dtype=kv_dtype)
    made = run(tight, texts, max_batch=32, chunk_tokens=512)
    assert made.num_preemptions > 0 and made.outputs == expected, "preempted and resumed"


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_chunk_boundaries_change_no_bit_of_a_prompt(model: Path, dtype: str) -> None:
    tokens = prompts(6)[5]
    runner = load(model, dtype)
    whole = hidden(runner, tokens, [])
    for cuts in ([1], [63, 64, 65], [16, 150], [299]):
        assert torch.equal(hidden(runner, tokens, cuts), whole), cuts


@pytest.mark.parametrize("graphs", [True, False])
def test_kv_told_of_before_a_step_is_over_is_whole(qwen3: Path, graphs: bool) -> None:
    runner = load(qwen3, graphs=graphs)
    blocks, num_blocks = list(range(48)), 6
    for turn in range(8):
        chunks = [
            Chunk(
                token_ids=[(turn + 7 * i + j) % 256 for j in range(384)],
                start=0,
                blocks=blocks[num_blocks * i : num_blocks * (i + 1)],
                prompt_len=384,
                sample=SampleRequest(params=SAMPLING, seeds=(i,), position=384),
            )
            for i in range(8)
        ]
        before = runner.cache.digest(blocks)
        step = runner.launch(chunks, None)
        assert step.wait_written()
        told = runner.cache.digest(blocks)
        runner.results(step)
        assert told == runner.cache.digest(blocks)
        assert not set(told) & set(before), "nothing was written"


def test_nan_left_by_a_former_owner_changes_nothing(qwen3: Path) -> None:
    runner = load(qwen3)
    texts = prompts(6)
    expected = run_engine(runner, texts, 20).outputs
    runner.cache.blocks.fill_(float("nan"))
    assert run_engine(runner, texts, 20).outputs == expected


def perplexity(runner: CudaRunner | ModelRunner, tokens: list[int]) -> float:
    chunk = Chunk(
        token_ids=tokens,
        start=0,
        blocks=list(range(8)),
        prompt_logprobs=0,
        next_token_ids=tokens[1:],
        prompt_len=len(tokens),
    )
    logprobs = [p.chosen.logprob for p in runner.step([chunk])[0].prompt_logprobs]
    return math.exp(-sum(logprobs) / len(logprobs))


def test_perplexity_of_the_demo_model_stays_within_bounds() -> None:
    tokens = PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "tokenizer.json")).encode(TEXT)
    exact = perplexity(ModelRunner.load(DEMO, dtype="fp32", num_blocks=8), tokens)
    found = {
        (dtype, kv_dtype): perplexity(load(DEMO, dtype, kv_dtype=kv_dtype), tokens)
        for dtype, kv_dtype in (("bf16", "auto"), ("bf16", "fp8"), ("fp8", "auto"), ("fp8", "fp8"))
    }
    print(f"perplexity over {len(tokens)} tokens: fp32 {exact:.3f}, {found}")
    for (dtype, kv_dtype), value in found.items():
        # Rounding to 8 bits of mantissa, and to 3 of weights and activations.
        limit = 0.01 if (dtype, kv_dtype) == ("bf16", "auto") else 0.05
        assert abs(math.log(value / exact)) < limit, (dtype, kv_dtype)
