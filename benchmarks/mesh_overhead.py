"""Tokens per second through the mesh against the engine alone, same model, same batch, one run.

Correctness first: both sides must give the same tokens. Run it with `--out FILE`.
The engine alone is one process with one thread; the mesh's workers have one thread each, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.plan import SamplingParams, StoppingParams
from engine.runner import ModelRunner
from engine.scheduler import DecodeScheduler
from engine.sequence import Sequence, StepOutcome
from tests.support.generate import greedy_request
from tests.support.mesh import Mesh, running_mesh

PROMPT_LEN, NUM_TOKENS = 64, 128


async def engine_alone(model: Path, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """Tokens of every prompt and decode tokens per second, prompts computed first."""
    torch.set_num_threads(1)
    runner = ModelRunner.load(
        model,
        device="cpu",
        dtype="fp32",
        kv_bytes=512 * 2**20,
        block_tokens=64,
        progress=lambda _: None,
    )
    pool = BlockPool(runner.cache.num_blocks, 64)
    times: list[float] = []
    left, done = len(prompts), asyncio.Event()

    def on_step(outcome: StepOutcome) -> None:
        nonlocal left
        times.extend([time.perf_counter()] * sum(len(item.token_ids) for item in outcome.items))
        left -= sum(item.is_finished for item in outcome.items)
        if not left:
            done.set()

    engine = Engine(runner, pool, DecodeScheduler(max_batch=64, chunk_tokens=8192), on_step)
    sequences = [_sequence(key, prompt) for key, prompt in enumerate(prompts)]
    for sequence in sequences:
        engine.add(sequence)
    loop = asyncio.ensure_future(engine.run())
    await done.wait()
    await engine.close()
    await loop
    return [sequence.output_token_ids for sequence in sequences], _rate(times, len(prompts))


def through_mesh(
    mesh: Mesh, prompts: list[list[int]]
) -> tuple[list[list[int]], float, list[float]]:
    """Tokens, tokens per second between the first tokens and the last, and gaps in seconds."""
    times: list[float] = []
    gaps: list[float] = []

    def run(prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        before = 0.0
        for response in mesh.generation.Generate(greedy_request(prompt, NUM_TOKENS)):
            now = time.perf_counter()
            new = list(response.delta.token_ids)
            times.extend([now] * len(new))
            if new and before:
                gaps.append((now - before) / len(new))
            before = now if new else before
            tokens += new
        return tokens

    with ThreadPoolExecutor(len(prompts)) as pool:
        tokens = list(pool.map(run, prompts))
    return tokens, _rate(times, len(prompts)), gaps


def _sequence(key: int, prompt: list[int]) -> Sequence:
    return Sequence(
        key=key,
        prompt_token_ids=prompt,
        seeds=(0,),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_new_tokens=NUM_TOKENS),
    )


def _rate(times: list[float], batch: int) -> float:
    """Tokens per second from the moment every sequence has its first token."""
    times = sorted(times)
    return (len(times) - batch) / (times[-1] - times[batch - 1])


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def measure(model: Path, mesh: Mesh, batch: int) -> dict[str, float]:
    """One batch size: medians of three runs."""
    rng = random.Random(batch)
    prompts = [[rng.randrange(200, 4000) for _ in range(PROMPT_LEN)] for _ in range(batch)]
    alone, meshed, gaps = [], [], []
    for _ in range(3):
        expected, rate = asyncio.run(engine_alone(model, prompts))
        alone.append(rate)
        tokens, rate, new_gaps = through_mesh(mesh, prompts)
        assert tokens == expected, "the mesh and the engine alone disagree"
        meshed.append(rate)
        gaps += new_gaps
    step_s = batch / statistics.median(alone)
    return {
        "batch": batch,
        "engine_tokens_per_s": round(statistics.median(alone), 1),
        "mesh_tokens_per_s": round(statistics.median(meshed), 1),
        "ratio": round(statistics.median(meshed) / statistics.median(alone), 3),
        "engine_step_ms": round(1e3 * step_s, 3),
        "added_ms_per_token_p50": round(1e3 * (_quantile(gaps, 0.5) - step_s), 3),
        "added_ms_per_token_p99": round(1e3 * (_quantile(gaps, 0.99) - step_s), 3),
    }


def main() -> None:
    """Measures batch sizes 1, 16 and 64 and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    flags = ("--kv-bytes", "512MiB")
    with running_mesh(options.model, store_bytes="512MiB", worker_flags=flags) as mesh:
        rows = [measure(options.model, mesh, batch) for batch in (1, 16, 64)]
    for row in rows:
        print(row)
    about = {
        "what": "decode through the mesh against the engine alone, greedy, fp32, CPU",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "prompt_len": PROMPT_LEN,
        "num_tokens": NUM_TOKENS,
        "rows": rows,
    }
    options.out.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
