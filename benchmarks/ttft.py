"""Time to the first token of a prompt the store has never seen and of the same prompt again.

    python -m benchmarks.ttft --out FILE
    python -m benchmarks.ttft --device cuda --model qwen3-8b --dtype fp8 --chunk-tokens 8192

Through a whole mesh of processes with one prefill, one decode rank and one kvstore. The client
measures from sending the request until the first token arrives; the parts are the gateway's Usage.
A cold prompt must be computed whole and a warm one must come from the store but for its last block,
both with the same tokens: that is checked before anything is timed, and in every timed run. Runs of
all lengths take turns, cold then warm, so that a noisy machine disturbs all of them.

--model is a directory, or qwen3-8b: random weights of that shape with the demo model's tokenizer.
The model runs from a copy whose context is long enough for the longest prompt. Beyond its own
context (2,048 tokens for the demo model) its answers mean nothing, but the work is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine_case import QWEN3_8B, prompts_of
from benchmarks.gpu.timing import environment, print_table
from benchmarks.transfer_bandwidth import cpu_name
from protos import gateway_pb2
from tests.support.generate import Answer, greedy_request
from tests.support.mesh import ROOT, Mesh, running_mesh

LENGTHS = (512, 2048, 8192)
NUM_TOKENS, BLOCK_TOKENS, NUM_CHECKS = 8, 64, 2
MIN_CONTEXT_LEN = max(LENGTHS) + NUM_TOKENS
SHAPES: dict[str, dict[str, Any]] = {"qwen3-8b": QWEN3_8B}
MEMORY = {"cpu": ("256MiB", "1GiB"), "cuda": ("4GiB", "16GiB")}
"""By device: of each worker and of the store. All blocks of a run and of the next fit."""
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """One request: seconds to its first token, all its tokens, and what the gateway says of it."""

    ttft_s: float
    token_ids: list[int]
    usage: gateway_pb2.Usage


def ask(mesh: Mesh, prompt: list[int]) -> First:
    """Runs one greedy request to its end."""
    answer, first_at = Answer(), 0.0
    sent_at = time.perf_counter()
    for response in mesh.generation.Generate(greedy_request(prompt, NUM_TOKENS), timeout=TIMEOUT_S):
        if not first_at and response.delta.token_ids:
            first_at = time.perf_counter()
        answer.add(response)
    assert answer.usage is not None
    return First(ttft_s=first_at - sent_at, token_ids=answer.tokens[0], usage=answer.usage)


def ask_twice(mesh: Mesh, prompt: list[int]) -> tuple[First, First]:
    """Cold, then warm; ValueError if the first was not cold, the second not warm or different."""
    cold, warm = ask(mesh, prompt), ask(mesh, prompt)
    cached = (cold.usage.num_cached_tokens, warm.usage.num_cached_tokens)
    if cached != (0, num_reusable(len(prompt))):
        raise ValueError(f"{len(prompt)} tokens: {cached} of them from the store")
    if len(cold.token_ids) != NUM_TOKENS or cold.token_ids != warm.token_ids:
        raise ValueError(f"{len(prompt)} tokens: {cold.token_ids} cold, {warm.token_ids} warm")
    return cold, warm


def num_reusable(prompt_len: int) -> int:
    """Tokens in full blocks that may come from the store: the last token is always computed."""
    return (prompt_len - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def measure(mesh: Mesh, vocab_size: int, num_runs: int) -> list[dict[str, object]]:
    """One row a length."""
    prompts = {
        length: prompts_of(NUM_CHECKS + num_runs, length, vocab_size, seed=length)
        for length in LENGTHS
    }
    runs: dict[int, list[tuple[First, First]]] = {length: [] for length in LENGTHS}
    for turn in range(NUM_CHECKS + num_runs):
        for length in LENGTHS:
            pair = ask_twice(mesh, prompts[length][turn])
            if turn >= NUM_CHECKS:
                runs[length].append(pair)
        print(f"turn {turn + 1} of {NUM_CHECKS + num_runs}: tokens are equal", flush=True)
    return [_row(length, pairs) for length, pairs in runs.items()]


def _row(length: int, pairs: list[tuple[First, First]]) -> dict[str, object]:
    """Milliseconds; medians where the name says nothing else. speedup: of the medians."""
    row: dict[str, object] = {"tokens": length, "warm_cached_tokens": num_reusable(length)}
    for name, runs in zip(("cold", "warm"), zip(*pairs, strict=True), strict=True):
        times = [run.ttft_s for run in runs]
        row[f"{name}_ms"] = _ms(statistics.median(times))
        row[f"{name}_ms_min"], row[f"{name}_ms_max"] = _ms(min(times)), _ms(max(times))
        for part in ("queue", "prefill", "put"):
            part_s = statistics.median(getattr(run.usage, f"{part}_s") for run in runs)
            row[f"{name}_{part}_ms"] = _ms(part_s)
    cold, warm = (
        statistics.median(run.ttft_s for run in runs) for runs in zip(*pairs, strict=True)
    )
    row["speedup"] = round(cold / warm, 2)
    return row


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def lay_out(model: str, folder: Path) -> dict[str, Any]:
    """Fills a folder with the model, its context long enough; returns the model's own config."""
    source = ROOT / "models" / "demo" if model in SHAPES else Path(model).resolve()
    config = SHAPES.get(model) or json.loads((source / "config.json").read_text())
    name = "max_position_embeddings"
    longer = {**config, name: max(config[name], MIN_CONTEXT_LEN)}
    for path in source.iterdir():
        if path.name != "config.json" and not (model in SHAPES and path.suffix == ".safetensors"):
            (folder / path.name).symlink_to(path)
    (folder / "config.json").write_text(json.dumps(longer))
    return config


def options_of_mesh(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `running_mesh`."""
    worker_bytes, store_bytes = MEMORY[options.device]
    load_format = "dummy" if options.model in SHAPES else options.load_format
    worker_flags = (
        *("--device", options.device, "--dtype", options.dtype, "--load-format", load_format),
        *("--kv-bytes", worker_bytes, "--block-tokens", str(BLOCK_TOKENS)),
        *("--max-batch", "16", "--chunk-tokens", str(options.chunk_tokens)),
    )
    store_flags = ("--device", options.device)
    return {"worker_flags": worker_flags, "store_bytes": store_bytes, "store_flags": store_flags}


def about(options: argparse.Namespace) -> dict[str, object]:
    """What was measured, where and with what."""
    cpu = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "num_threads_of_a_worker": 1,
    }
    return {
        "what": "time to first token, a prompt the store never saw and the same again; one request "
        "at a time, client and mesh on one machine, greedy",
        "machine": f"{platform.machine()}, {cpu_name()}",
        "load_average_1min": round(os.getloadavg()[0], 1),
        **(environment() if options.device == "cuda" else cpu),
        "model": options.model,
        "dtype": options.dtype,
        "chunk_tokens": options.chunk_tokens,
        "block_tokens": BLOCK_TOKENS,
        "num_tokens": NUM_TOKENS,
        "num_runs": options.runs,
    }


def main() -> None:
    """Starts a mesh, measures all lengths and writes one JSON file."""
    parser = argparse.ArgumentParser(description="Time to first token, cold and warm")
    parser.add_argument("--model", default="models/demo", help="a directory, or qwen3-8b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="auto", help="as of the workers")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="of a prompt, in one step")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each length")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = lay_out(options.model, Path(folder))
        with running_mesh(Path(folder), **options_of_mesh(options)) as mesh:
            rows = measure(mesh, config["vocab_size"], options.runs)
    print_table("time to first token", rows)
    if options.out is not None:
        context_len = config["max_position_embeddings"]
        contexts = {"model": context_len, "served": max(context_len, MIN_CONTEXT_LEN)}
        result = {**about(options), "context_len": contexts, "rows": rows}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
