"""Decode steps, throughput and prefill of the whole engine on Qwen3-8B-shaped random weights.

Wall time as a client of the engine sees it, greedy, without prefix reuse. The floor of a decode
step is the bytes that it must read (weights without the embedding, KV of the mean context) over the
copy bandwidth of the same run.
"""

from __future__ import annotations

import gc
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.engine_case import (
    PARTS,
    QWEN3_8B,
    Run,
    load_dummy,
    prompts_of,
    run_engine,
)
from benchmarks.gpu.timing import Result, print_table
from engine.cuda_runner import CudaRunner
from engine.plan import Chunk, SampleRequest, SamplingParams

PROMPT_LEN = 128
_VOCAB = QWEN3_8B["vocab_size"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Milliseconds a step must and should take, and what vLLM 0.25.1 took on the same GPU."""

    must: float
    aim: float
    peer: float | None = None


# (dtype, kv dtype) -> sequences -> target.
DECODE: dict[tuple[str, str], dict[int, Target]] = {
    ("fp8", "auto"): {
        1: Target(must=4.1, aim=3.5, peer=4.52),
        16: Target(must=4.6, aim=3.9, peer=4.94),
        64: Target(must=6.2, aim=5.2, peer=6.60),
        256: Target(must=12.0, aim=10.4, peer=12.75),
    },
    ("bf16", "auto"): {
        1: Target(must=6.4, aim=5.9, peer=6.81),
        16: Target(must=6.9, aim=6.4, peer=7.31),
        64: Target(must=8.4, aim=7.7, peer=8.78),
        256: Target(must=14.6, aim=13.0, peer=15.4),
    },
    ("fp8", "fp8"): {256: Target(must=9.0, aim=7.5)},
}
# Tokens of a prompt -> target, by dtype.
PREFILL: dict[str, dict[int, Target]] = {
    "fp8": {2048: Target(must=35, aim=29, peer=36.8), 8192: Target(must=150, aim=135, peer=160)},
    "bf16": {2048: Target(must=54, aim=48, peer=55.1), 8192: Target(must=235, aim=215, peer=242)},
}
# Output tokens a second over 128 in, 512 out: (must, aim, peer), FP8.
THROUGHPUT = {64: (10_200, 12_000, 9_640), 256: (20_500, 24_000, 19_388)}


def run(bandwidth: float) -> Result:
    """Every case; ValueError when tokens depend on the batch."""
    rows: list[dict[str, object]] = []
    parts: list[dict[str, object]] = []
    for (dtype, kv_dtype), cases in DECODE.items():
        runner = load_dummy(dtype=dtype, kv_dtype=kv_dtype, max_batch=256, chunk_tokens=8192)
        check(runner)
        for num_sequences, target in cases.items():
            rows += decode_rows(runner, num_sequences, target, dtype, kv_dtype, bandwidth)
        if kv_dtype == "auto":
            rows += [
                prefill_row(runner, num_tokens, target, dtype)
                for num_tokens, target in PREFILL[dtype].items()
            ]
        if (dtype, kv_dtype) == ("fp8", "auto"):
            parts = [breakdown(runner, num_sequences) for num_sequences in (1, 64, 256)]
            print_table("decode step by part, one kernel after the other, ms", parts)
        del runner
        gc.collect()
        torch.cuda.empty_cache()
    return Result(
        name="engine",
        what="engine, Qwen3-8B-shaped random weights, 128 tokens in",
        rows=[*rows, *parts],
        copy_bytes_per_s=bandwidth,
        notes=[
            "ratio: must / ms, or tokens / must: 1 and more is reached",
            "vllm: 0.25.1 on the same kind of GPU, FlashAttention 3, CUTLASS per-tensor FP8, "
            "torch.compile, full CUDA graphs; wall time of its offline engine, greedy, prefix "
            "caching off",
        ],
    )


def check(runner: CudaRunner) -> None:
    """ValueError unless tokens are the same alone, in a batch, and with other chunk boundaries."""
    prompts = [text[: 16 + 7 * i] for i, text in enumerate(prompts_of(12, PROMPT_LEN, _VOCAB))]
    together = run_engine(runner, prompts, 24).outputs
    if run_engine(runner, prompts, 24, chunk_tokens=100).outputs != together:
        raise ValueError("tokens depend on chunk boundaries")
    for index in (0, 11):
        # A greedy sequence has no use for its seed.
        if run_engine(runner, [prompts[index]], 24).outputs[0] != together[index]:
            raise ValueError(f"tokens of prompt {index} depend on the batch")


def decode_rows(
    runner: CudaRunner,
    num_sequences: int,
    target: Target,
    dtype: str,
    kv_dtype: str,
    bandwidth: float,
) -> list[dict[str, object]]:
    """Mean step time over outputs 128 to 512 (one sequence: 64 to 256), and throughput."""
    first, last = (64, 256) if num_sequences == 1 else (128, 512)
    made = run_engine(runner, prompts_of(num_sequences, PROMPT_LEN, _VOCAB), last)
    step_ms = made.step_s(first, last) * 1e3
    context = PROMPT_LEN + (first + last) // 2
    floor_ms = step_num_bytes(runner, num_sequences, context) / bandwidth * 1e3
    rows: list[dict[str, object]] = [
        {
            "case": f"decode {dtype}, KV {kv_dtype}",
            "sequences": num_sequences,
            "ms": step_ms,
            "floor_ms": floor_ms,
            "must": target.must,
            "aim": target.aim,
            "vllm": target.peer or "",
            "ratio": target.must / step_ms,
            **means(made, first, last),
        }
    ]
    if (dtype, kv_dtype) == ("fp8", "auto") and num_sequences in THROUGHPUT:
        rows.append(throughput_row(made, num_sequences))
    return rows


def throughput_row(made: Run, num_sequences: int) -> dict[str, object]:
    """Output tokens a second of a whole run, prompts included."""
    must, aim, peer = THROUGHPUT[num_sequences]
    return {
        "case": "tokens/s fp8, 512 out",
        "sequences": num_sequences,
        "tokens_per_s": round(made.tokens_per_s),
        "must": must,
        "aim": aim,
        "vllm": peer,
        "ratio": made.tokens_per_s / must,
    }


def means(made: Run, first: int, last: int) -> dict[str, object]:
    """Mean milliseconds of a step's parts."""
    window = made.window(first, last)
    return {
        name.replace("_s", "_ms"): statistics.fmean(step[name] for step in window) * 1e3
        for name in PARTS
    }


def step_num_bytes(runner: CudaRunner, num_sequences: int, context: int) -> float:
    """Bytes a decode step must read: all weights but the embedding, and the sequences' KV."""
    layout = runner.layout
    kv = num_sequences * context * layout.num_bytes / layout.block_tokens
    return runner.decoder.step_num_bytes + kv


def prefill_row(
    runner: CudaRunner, num_tokens: int, target: Target, dtype: str, num_runs: int = 5
) -> dict[str, object]:
    """Median wall time from a prompt to its first token."""
    times: list[float] = []
    for seed in range(num_runs):
        made = run_engine(runner, prompts_of(1, num_tokens, _VOCAB, seed), 1)
        times.append(made.ended_at - made.started_at)
    ms = statistics.median(times) * 1e3
    return {
        "case": f"prefill {dtype}",
        "tokens": num_tokens,
        "ms": ms,
        "must": target.must,
        "aim": target.aim,
        "vllm": target.peer or "",
        "ratio": target.must / ms,
    }


def decode_chunks(runner: CudaRunner, num_sequences: int, context: int) -> list[Chunk]:
    """One step of sequences that have `context` tokens each, over whatever the cache holds."""
    width = -(-context // runner.layout.block_tokens)
    greedy = SamplingParams(temperature=0.0)
    return [
        Chunk(
            token_ids=[number],
            start=context - 1,
            blocks=list(range(number * width, (number + 1) * width)),
            sample=SampleRequest(params=greedy, seeds=(number,), position=context),
        )
        for number in range(num_sequences)
    ]


def breakdown(
    runner: CudaRunner, num_sequences: int, *, context: int = 448, num_steps: int = 5
) -> dict[str, object]:
    """Milliseconds of a step by kind of kernel, without overlap of neighbours."""
    plain = CudaRunner(
        runner.config,
        runner.decoder,
        runner.cache,
        runner.precision,
        max_batch=256,
        chunk_tokens=16,
        pdl=False,
        graphs=False,
    )
    chunks = decode_chunks(runner, num_sequences, context)
    plain.step(chunks)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as made:
        for _ in range(num_steps):
            plain.step(chunks)
        torch.cuda.synchronize()
    parts: dict[str, float] = defaultdict(float)
    part = ""
    events = [event for event in made.events() or [] if event.device_type.name == "CUDA"]
    for event in sorted(events, key=lambda event: event.time_range.start):
        part = part_of(event.name, part)
        parts[part] += event.time_range.elapsed_us() / 1e3 / num_steps
    named: dict[str, Any] = {"case": "parts", "sequences": num_sequences}
    return named | dict(sorted(parts.items(), key=lambda part: -part[1]))


_PARTS = {
    "_plan_kernel": "plan",
    "_update_kernel": "plan",
    "_rmsnorm": "norm",
    "_quantise": "quantise",
    "_silu": "silu",
    "_qkv": "qkv",
    "_embed": "embed",
    "sample_rows": "sampling",
    "_report": "stamps",
    "Memcpy": "copies",
    "Memset": "copies",
}


def part_of(kernel: str, before: str) -> str:
    """The part of an FP8 decode step that a kernel belongs to; before: of the kernel before it.

    Between the q|k|v kernel and the quantisation all is attention; what has no name is a product.
    """
    part = next((part for name, part in _PARTS.items() if name in kernel), "products")
    return "attention" if part == "products" and before in ("qkv", "attention") else part
