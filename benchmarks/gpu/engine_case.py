"""An engine on random Qwen3-8B-shaped weights, and runs of it with their times.

Owns the model's shape, the workload and what is read off the clock. Never prints.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.block_pool import BlockPool
from engine.cuda_runner import CudaRunner
from engine.engine import Engine
from engine.plan import SamplingParams, StoppingParams
from engine.runner import ModelRunner
from engine.runners import RunnerOptions, load_cuda_runner
from engine.scheduler import DecodeScheduler
from engine.sequence import Sequence, StepOutcome

# As Qwen/Qwen3-8B's config.json.
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": 151645,
}

Listener = Callable[[StepOutcome], object]
PARTS = ("forward_s", "sample_s", "gap_s", "schedule_s", "emit_s")
"""Of a step, as engine.sequence.StepOutcome has them."""


def load_dummy(
    config: dict[str, Any] = QWEN3_8B, progress: Callable[[str], None] = print, **options: Any
) -> CudaRunner:
    """A runner on random weights of config; options as for RunnerOptions."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        made = RunnerOptions(load_format="dummy", **options)
        return load_cuda_runner(Path(folder), options=made, progress=progress)


def prompts_of(
    num_prompts: int, prompt_len: int, vocab_size: int, seed: int = 0
) -> list[list[int]]:
    """Random token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(prompt_len)] for _ in range(num_prompts)]


@dataclass(slots=True)
class Run:
    """What came of a workload.

    times[i], counts[i], parts[i]: wall time of step i's end, (fewest, most) outputs any sequence
    had by then, and seconds of its PARTS.
    """

    outputs: list[list[int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    num_preemptions: int = 0
    started_at: float = 0.0
    ended_at: float = 0.0

    def step_s(self, first: int, last: int) -> float:
        """Mean seconds of a step from every sequence's `first` to any sequence's `last` output."""
        begin = next(i for i, (fewest, _) in enumerate(self.counts) if fewest >= first)
        end = next(i for i, (_, most) in enumerate(self.counts) if most >= last)
        return (self.times[end] - self.times[begin]) / (end - begin)

    def window(self, first: int, last: int) -> list[dict[str, float]]:
        """PARTS of the steps that `step_s` averages over."""
        begin = next(i for i, (fewest, _) in enumerate(self.counts) if fewest >= first)
        end = next(i for i, (_, most) in enumerate(self.counts) if most >= last)
        return self.parts[begin + 1 : end + 1]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the wall time of the whole run, prefill included."""
        return sum(map(len, self.outputs)) / (self.ended_at - self.started_at)


def run_engine(
    runner: CudaRunner | ModelRunner,
    prompts: list[list[int]],
    num_outputs: int,
    *,
    max_batch: int = 256,
    chunk_tokens: int = 8192,
    sampling: SamplingParams | None = None,
    listener: Callable[[Engine], Listener] | None = None,
) -> Run:
    """All prompts at once through the real engine, num_outputs tokens each.

    listener: makes what hears of each step before its time is taken.
    """
    return asyncio.run(
        _run(runner, prompts, num_outputs, max_batch, chunk_tokens, sampling, listener)
    )


async def _run(
    runner: CudaRunner | ModelRunner,
    prompts: list[list[int]],
    num_outputs: int,
    max_batch: int,
    chunk_tokens: int,
    sampling: SamplingParams | None,
    listener: Callable[[Engine], Listener] | None,
) -> Run:
    sequences = _sequences(prompts, num_outputs, sampling or SamplingParams(temperature=0.0))
    watch = _Watch(sequences)
    pool = BlockPool(runner.cache.num_blocks, runner.layout.block_tokens)
    scheduler = DecodeScheduler(max_batch=max_batch, chunk_tokens=chunk_tokens)
    engine = Engine(runner, pool, scheduler, watch.on_step, watch.on_failure)
    if listener is not None:
        watch.listener = listener(engine)
    # What is there now is not looked at again: a full collection would stop several steps.
    gc.collect()
    gc.freeze()
    loop = asyncio.ensure_future(engine.run())
    run = watch.run
    run.started_at = time.perf_counter()
    for sequence in sequences:
        engine.add(sequence)
    await watch.done.wait()
    run.ended_at = time.perf_counter()
    await engine.close()
    await loop
    gc.unfreeze()
    if watch.failures:
        raise watch.failures[0]
    run.num_preemptions = scheduler.num_preemptions
    run.outputs = [sequence.output_token_ids for sequence in sequences]
    return run


def _sequences(
    prompts: list[list[int]], num_outputs: int, sampling: SamplingParams
) -> list[Sequence]:
    """One for each prompt."""
    return [
        Sequence(
            key=index,
            prompt_token_ids=prompt,
            seeds=(index,),
            sampling=sampling,
            stopping=StoppingParams(max_new_tokens=num_outputs),
        )
        for index, prompt in enumerate(prompts)
    ]


class _Watch:
    """Notes what every step did until all sequences are over, or one has failed."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.run = Run()
        self.done = asyncio.Event()
        self.failures: list[BaseException] = []
        self.listener: Listener = lambda outcome: None
        self._sequences = sequences
        self._num_left = len(sequences)

    def on_step(self, outcome: StepOutcome) -> None:
        """Keeps numbers only: the objects of a step would make collections longer."""
        self.listener(outcome)
        self.run.times.append(time.perf_counter())
        lengths = [len(sequence.output_token_ids) for sequence in self._sequences]
        self.run.counts.append((min(lengths), max(lengths)))
        self.run.parts.append({name: getattr(outcome, name) for name in PARTS})
        self._num_left -= sum(item.is_finished for item in outcome.items)
        if not self._num_left:
            self.done.set()

    def on_failure(self, _: list[Sequence], error: BaseException) -> None:
        """Ends the run."""
        self.failures.append(error)
        self.done.set()
