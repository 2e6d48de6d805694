"""Tokens per second through the mesh against the engine alone, same model, same batch, one run.

Correctness first: both sides must give the same tokens. Both are measured while every sequence is
decoding: from the moment the last one has its first token until the first one ends. The two sides
take turns, and the ratio is the median of the turns' ratios, so that a noisy machine disturbs both.
Run it with `--out FILE`. The engine alone is one process with one thread; the mesh's workers have
one thread each, too, and share the machine with gateway, kvstore and client.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import random
import statistics
import time
from pathlib import Path

import grpc
import torch

from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.plan import SamplingParams, StoppingParams
from engine.runner import ModelRunner
from engine.scheduler import DecodeScheduler
from engine.sequence import Sequence, StepOutcome
from protos import gateway_pb2_grpc
from tests.support.generate import greedy_request
from tests.support.mesh import Mesh, running_mesh

PROMPT_LEN, NUM_TOKENS, NUM_TURNS = 64, 256, 5


Arrivals = list[list[float]]
"""When each token of each sequence came, in seconds of one clock."""


async def engine_alone(model: Path, prompts: list[list[int]]) -> tuple[list[list[int]], Arrivals]:
    """Tokens of every prompt, and when they came."""
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
    arrivals: Arrivals = [[] for _ in prompts]
    left, done = len(prompts), asyncio.Event()

    def on_step(outcome: StepOutcome) -> None:
        nonlocal left
        now = time.perf_counter()
        for item in outcome.items:
            arrivals[item.sequence.key].extend([now] * len(item.token_ids))
            left -= item.is_finished
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
    return [sequence.output_token_ids for sequence in sequences], arrivals


def through_mesh(mesh: Mesh, prompts: list[list[int]]) -> tuple[list[list[int]], Arrivals]:
    """Tokens of every prompt as a client gets them, and when they came."""

    async def run(
        stub: gateway_pb2_grpc.GenerationServiceStub, prompt: list[int]
    ) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        times: list[float] = []
        async for response in stub.Generate(greedy_request(prompt, NUM_TOKENS)):
            new = response.delta.token_ids
            times.extend([time.perf_counter()] * len(new))
            tokens.extend(new)
        return tokens, times

    async def run_all() -> list[tuple[list[int], list[float]]]:
        async with grpc.aio.insecure_channel(mesh.address) as channel:
            stub = gateway_pb2_grpc.GenerationServiceStub(channel)
            return await asyncio.gather(*(run(stub, prompt) for prompt in prompts))

    answers = asyncio.run(run_all())
    return [tokens for tokens, _ in answers], [times for _, times in answers]


def _sequence(key: int, prompt: list[int]) -> Sequence:
    return Sequence(
        key=key,
        prompt_token_ids=prompt,
        seeds=(0,),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_new_tokens=NUM_TOKENS),
    )


def _window(arrivals: Arrivals) -> tuple[float, float]:
    """From when every sequence has its first token until the first one ends."""
    return max(times[0] for times in arrivals), min(times[-1] for times in arrivals)


def _rate(arrivals: Arrivals) -> float:
    """Tokens per second while all sequences decode."""
    start, stop = _window(arrivals)
    return sum(start < at <= stop for times in arrivals for at in times) / (stop - start)


def _gaps(arrivals: Arrivals) -> list[float]:
    """Seconds between neighbouring tokens of a sequence while all decode; several at once: 0."""
    start, stop = _window(arrivals)
    return [
        after - before
        for times in arrivals
        for before, after in itertools.pairwise(times)
        if start < after <= stop
    ]


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def measure(model: Path, mesh: Mesh, batch: int) -> dict[str, float]:
    """One batch size: medians of NUM_TURNS turns."""
    rng = random.Random(batch)
    prompts = [[rng.randrange(200, 4000) for _ in range(PROMPT_LEN)] for _ in range(batch)]
    alone: list[float] = []
    meshed: list[float] = []
    own_gaps: list[float] = []
    gaps: list[float] = []
    for _ in range(NUM_TURNS):
        expected, arrivals = asyncio.run(engine_alone(model, prompts))
        alone.append(_rate(arrivals))
        own_gaps += _gaps(arrivals)
        tokens, arrivals = through_mesh(mesh, prompts)
        assert tokens == expected, "the mesh and the engine alone disagree"
        meshed.append(_rate(arrivals))
        gaps += _gaps(arrivals)
    ratios = [one / other for one, other in zip(meshed, alone, strict=True)]
    return {
        "batch": batch,
        "engine_tokens_per_s": round(statistics.median(alone), 1),
        "mesh_tokens_per_s": round(statistics.median(meshed), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "engine_gap_ms_p50": round(1e3 * _quantile(own_gaps, 0.5), 3),
        "engine_gap_ms_p99": round(1e3 * _quantile(own_gaps, 0.99), 3),
        "added_ms_per_token_p50": round(1e3 * (_quantile(gaps, 0.5) - _quantile(own_gaps, 0.5)), 3),
        "added_ms_per_token_p99": round(
            1e3 * (_quantile(gaps, 0.99) - _quantile(own_gaps, 0.99)), 3
        ),
    }


def main() -> None:
    """Measures batch sizes 1, 16 and 64 and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    flags = ("--kv-bytes", "512MiB")
    with running_mesh(options.model, store_bytes="512MiB", worker_flags=flags) as mesh:
        rows = []
        for batch in (1, 16, 64):
            rows.append(measure(options.model, mesh, batch))
            print(rows[-1], flush=True)
    about = {
        "what": "decode through the mesh against the engine alone, greedy, fp32, CPU",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "prompt_len": PROMPT_LEN,
        "num_tokens": NUM_TOKENS,
        "num_turns": NUM_TURNS,
        "rows": rows,
    }
    options.out.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
