"""`kvmesh bench`: puts a mesh under load through its public port and prints what a client sees.

Owns the load and the arithmetic. Prompts are random token ids: nothing is in the store beforehand,
unless `--shared-prefix` asks for it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import itertools
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from kvmesh.client import AsyncClient
from kvmesh.console import table
from kvmesh.launcher import Launcher, LaunchError
from kvmesh.options import MeshOptions, PlanError
from kvmesh.plan import plan_mesh
from mesh.errors import KvmeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of the mesh."""

    num_requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request as its client saw it; seconds since it was sent."""

    first_token_s: float
    gaps_s: tuple[float, ...]
    num_output_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures: the whole run's seconds, rates, quantiles in ms, failures by reason.

    A gap between two deltas counts once, also when a delta carries several tokens.
    """

    wall_s: float
    num_requests: int
    num_output_tokens: int
    num_cached_tokens: int
    tokens_per_s: float
    requests_per_s: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    failures: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    for flag, default, minimum, help_text in (
        ("--requests", 64, 1, "number of requests"),
        ("--concurrency", 8, 1, "requests in flight at once"),
        ("--prompt-tokens", 128, 1, "prompt length"),
        ("--output-tokens", 64, 1, "tokens generated each"),
        ("--shared-prefix", 0, 0, "leading tokens equal in all prompts, at most all of them"),
    ):
        parser.add_argument(
            flag, type=functools.partial(_number, minimum), default=default, help=help_text
        )
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.add_argument("--start", action="store_true", help="start a mesh for the run")
    parser.add_argument("--model", type=Path, help="with --start: the model to serve")


def run_bench(args: argparse.Namespace) -> int:
    """Runs the command; exit code 1 when a request failed or nothing answers."""
    load = Load(
        num_requests=args.requests,
        concurrency=args.concurrency,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        shared_prefix=min(args.shared_prefix, args.prompt_tokens),
        seed=args.seed,
    )
    try:
        if args.start:
            report = asyncio.run(_with_mesh(args.model and args.model.resolve(), load))
        else:
            report = asyncio.run(measure(args.addr, load))
    except (KvmeshError, LaunchError, PlanError) as error:
        print(f"kvmesh bench: {error}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(report)) if args.json else render(report))
    return 1 if report.failures else 0


def _number(minimum: int, text: str) -> int:
    value = int(text)
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value}; give at least {minimum}")
    return value


async def measure(addr: str, load: Load) -> Report:
    """Sends one warm-up request, then the load; raises KvmeshError if the warm-up fails."""
    rng = random.Random(load.seed)
    async with AsyncClient(addr) as client:
        vocab_size = (await client.models())[0].vocab_size
        prefix = _tokens(rng, vocab_size, load.shared_prefix)
        own = load.prompt_tokens - load.shared_prefix
        prompts = [prefix + _tokens(rng, vocab_size, own) for _ in range(load.num_requests + 1)]
        await _request(client, prompts.pop(), load.output_tokens)
        started_at = time.perf_counter()
        samples, failures = await _run_all(
            [lambda p=prompt: _request(client, p, load.output_tokens) for prompt in prompts],
            load.concurrency,
        )
        return _report(samples, failures, time.perf_counter() - started_at)


def render(report: Report) -> str:
    """The figures as a table."""
    rows = [
        ("requests", f"{report.num_requests} in {report.wall_s:.1f} s"),
        ("requests/s", f"{report.requests_per_s:.2f}"),
        ("output tokens/s", f"{report.tokens_per_s:.1f}"),
        ("prompt tokens from the store", str(report.num_cached_tokens)),
        ("first token p50 / p99 ms", _pair(report.first_token_p50_ms, report.first_token_p99_ms)),
        ("inter-token p50 / p99 ms", _pair(report.inter_token_p50_ms, report.inter_token_p99_ms)),
        *((f"failed: {reason}", str(count)) for reason, count in report.failures.items()),
    ]
    return table(("figure", "value"), rows)


async def _with_mesh(model: Path | None, load: Load) -> Report:
    if model is None:
        raise PlanError("--start needs --model DIR")
    plan = plan_mesh(MeshOptions(model=model, port=0, log_level="warning"))
    launcher = Launcher(plan, lambda name, line: print(f"{name}: {line}", file=sys.stderr))
    try:
        await launcher.start()
        return await measure(plan.gateway.address, load)
    finally:
        await launcher.stop()


async def _run_all(
    calls: list[Callable[[], Awaitable[Sample]]], concurrency: int
) -> tuple[list[Sample], dict[str, int]]:
    samples: list[Sample] = []
    failures: dict[str, int] = {}
    queue = iter(calls)

    async def worker() -> None:
        for call in queue:
            try:
                samples.append(await call())
            except KvmeshError as error:
                failures[error.reason] = failures.get(error.reason, 0) + 1

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return samples, failures


async def _request(client: AsyncClient, prompt: list[int], output_tokens: int) -> Sample:
    sent_at = time.perf_counter()
    arrivals: list[float] = []
    generation = client.generate(
        prompt, max_new_tokens=output_tokens, ignore_eos=True, temperature=0.0
    )
    async for delta in generation:
        if delta.token_ids:
            arrivals.append(time.perf_counter() - sent_at)
    result = await generation.result()
    return Sample(
        first_token_s=arrivals[0] if arrivals else time.perf_counter() - sent_at,
        gaps_s=tuple(b - a for a, b in itertools.pairwise(arrivals)),
        num_output_tokens=result.usage.num_output_tokens,
        num_cached_tokens=result.usage.num_cached_tokens,
    )


def _report(samples: list[Sample], failures: dict[str, int], wall_s: float) -> Report:
    first = [sample.first_token_s for sample in samples]
    gaps = [gap for sample in samples for gap in sample.gaps_s]
    num_output_tokens = sum(sample.num_output_tokens for sample in samples)
    return Report(
        wall_s=wall_s,
        num_requests=len(samples),
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(sample.num_cached_tokens for sample in samples),
        tokens_per_s=num_output_tokens / wall_s,
        requests_per_s=len(samples) / wall_s,
        first_token_p50_ms=1e3 * quantile(first, 0.5),
        first_token_p99_ms=1e3 * quantile(first, 0.99),
        inter_token_p50_ms=1e3 * quantile(gaps, 0.5),
        inter_token_p99_ms=1e3 * quantile(gaps, 0.99),
        failures=failures,
    )


def quantile(values: list[float], q: float) -> float:
    """The nearest-rank quantile; 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def _tokens(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(count)]


def _pair(low: float, high: float) -> str:
    return f"{low:.1f} / {high:.1f}"
