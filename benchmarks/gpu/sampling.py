"""Times the row sampler beside torch: greedy, plain, top-k, top-p, min-p, log probabilities.

    python -m benchmarks.gpu.sampling [--check-only] [--write]

Logits [M, 151936] bf16 and fp32, M = 1 to 256, L2-cold. "peaked" logits are as a language model's
(a few hundred tokens far ahead), "flat" ones normal: the worst case of top-p and top-k, whose cost
grows with the number of rounds. The peers are torch.argmax and softmax + sort + multinomial.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.timing import Result, copy_bandwidth, num_sets, print_table, time_graph
from engine.gpu_sampler import GpuSampler
from engine.plan import SampleRequest, SamplingParams

VOCAB_SIZE = 151936
ROWS = (1, 16, 64, 256)
CASES: dict[str, dict[str, Any]] = {
    "temperature": {},
    "top_k 20, top_p 0.95, T 0.6": {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
    "top_k 300": {"top_k": 300},
    "top_k 300, top_p 0.9": {"top_k": 300, "top_p": 0.9},
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.5": {"top_p": 0.5},
    "min_p 0.05": {"min_p": 0.05},
}


def logits_of(kind: str, num_rows: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[num_rows, VOCAB_SIZE], "flat" or "peaked"."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(num_rows, VOCAB_SIZE, device="cuda", generator=generator)
    if kind == "peaked":
        likely = torch.randint(VOCAB_SIZE, (400,), device="cuda", generator=generator)
        values[:, likely] += torch.rand(num_rows, 400, device="cuda", generator=generator) * 14
    return values.to(dtype)


def launches(
    params: dict[str, Any], sets: list[torch.Tensor], num_logprobs: int | None = None
) -> list[Callable[[], None]]:
    """One launch per set of logits, every row with the same parameters and its own seed."""
    num_rows = len(sets[0])
    sampler = GpuSampler(VOCAB_SIZE, num_rows, "cuda")
    rows = [
        SampleRequest(
            params=SamplingParams(**params), seeds=(seed,), position=9, num_logprobs=num_logprobs
        )
        for seed in range(num_rows)
    ]
    sampler.send(sampler.prepare(rows))
    return [lambda logits=logits: sampler.launch(logits, num_rows) for logits in sets]


def sort_top_p(logits: torch.Tensor, top_p: float = 0.9) -> torch.Tensor:
    """Nucleus sampling as usually written in torch."""
    probs, ids = torch.softmax(logits.float(), -1).sort(-1, descending=True)
    kept = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0.0)
    return ids.gather(1, torch.multinomial(kept, 1))


def check() -> None:
    """Greedy against torch and a filtered draw against the sorted set, or a ValueError."""
    logits = logits_of("peaked", 64, torch.bfloat16, 0)
    sampler = GpuSampler(VOCAB_SIZE, 64, "cuda")
    cases: list[dict[str, Any]] = [{"temperature": 0.0}, *CASES.values()]
    for params in cases:
        rows = [
            SampleRequest(params=SamplingParams(**params), seeds=(seed,), position=9)
            for seed in range(64)
        ]
        sampler.sample(logits, rows)
        scaled = logits.float() / max(params.get("temperature", 1.0), 1e-3)
        probs, ids = torch.sort(torch.softmax(scaled, -1), stable=True, dim=-1, descending=True)
        if params.get("temperature") == 0.0:
            num_kept = torch.ones(64, device="cuda")
        else:
            probs = probs[:, : params.get("top_k", VOCAB_SIZE)]
            share = probs / probs.sum(-1, keepdim=True)
            kept = (share.cumsum(-1) - share < params.get("top_p", 1.0) + 1e-5) & (
                share >= params.get("min_p", 0.0) * share[:, :1] * (1 - 1e-5)
            )
            num_kept = kept.sum(-1)
        place = (ids == sampler.tokens[:, None]).int().argmax(-1)
        if not bool((place < num_kept).all()):
            raise ValueError(f"{params}: a token outside what the filters keep")


def measure(num_rows: int, dtype: torch.dtype, bandwidth: float) -> list[dict[str, object]]:
    """Times of one shape in µs, per kind of logits."""
    num_bytes = num_rows * VOCAB_SIZE * dtype.itemsize
    found: list[dict[str, object]] = []
    for kind in ("peaked", "flat"):
        sets = [logits_of(kind, num_rows, dtype, s) for s in range(num_sets(num_bytes, limit=64))]
        row: dict[str, object] = {"rows": num_rows, "dtype": str(dtype)[6:], "logits": kind}
        greedy = time_graph(launches({"temperature": 0.0}, sets))
        row["floor_us"] = num_bytes / bandwidth * 1e6
        row["greedy_us"] = greedy * 1e6
        row["greedy_copy_share"] = num_bytes / bandwidth / greedy
        peer = [lambda logits=logits: torch.argmax(logits, -1) for logits in sets]
        row["torch_argmax_us"] = time_graph(peer) * 1e6
        for name, params in CASES.items():
            row[f"{name}_us"] = time_graph(launches(params, sets)) * 1e6
        row["greedy, 5 logprobs_us"] = time_graph(launches({"temperature": 0.0}, sets, 5)) * 1e6
        row["temperature, 20 logprobs_us"] = time_graph(launches({}, sets, 20)) * 1e6
        row["torch_sort_top_p_us"] = _eager_us(lambda logits=sets[0]: sort_top_p(logits))
        found.append(row)
    return found


def _eager_us(call: Callable[[], object], num_calls: int = 10) -> float:
    """Mean µs of a call that cannot be captured."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    for _ in range(num_calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / num_calls * 1e3


def main() -> None:
    """Checks, then prints the table and writes it when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check-only", action="store_true", help="compare, do not time")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    check()
    if options.check_only:
        return
    bandwidth = copy_bandwidth()
    rows = [
        row
        for dtype in (torch.bfloat16, torch.float32)
        for num_rows in ROWS
        for row in measure(num_rows, dtype, bandwidth)
    ]
    print_table(f"sampling, copy {bandwidth / 1e12:.2f} TB/s", rows)
    if options.write:
        result = Result(
            name="sampling",
            what="one launch over logits [rows, 151936], every row in the named mode; L2-cold",
            rows=rows,
            copy_bytes_per_s=bandwidth,
            notes=["torch_sort_top_p: softmax, sort, cumsum, multinomial, eager, one set"],
        )
        print(result.write())


if __name__ == "__main__":
    main()
