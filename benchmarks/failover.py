"""Time from SIGKILL of a decode rank to the next token at the client, p50 and p99.

Correctness first: every stream must end with exactly the tokens of an undisturbed run. Two ranks
serve; the busy one is killed while a stream runs, and started again before the next turn. Tokens
that were on their way when the rank died still arrive, at the stream's pace; the time counted is
until the first token after that pace broke off. Run it with `--out FILE`, on a GPU with

    python -m benchmarks.failover --device cuda --model qwen3-8b --dtype fp8 --kills 12 --out FILE
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.timing import environment
from benchmarks.ttft import lay_out, options_of_mesh
from tests.support.books import Books
from tests.support.generate import Answer, generate, sampled_request
from tests.support.injectors import kill, revive
from tests.support.mesh import Mesh, running_mesh
from tests.support.mixture import salted

# A gap this many times the usual one is where the dead rank's tokens end.
BREAK = 3
PROMPT_LEN, NUM_TOKENS, VOCAB_SIZE = 200, 400, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Seconds without a token and until the system had ended the process; tokens before it."""

    silence_s: float
    exit_s: float
    num_before: int


def one_kill(mesh: Mesh, answer: Answer, expected: list[int], kill_after: int) -> Kill:
    """Kills the busy rank in mid-stream."""
    prompt_rng = random.Random(1)
    prompt = [prompt_rng.randrange(VOCAB_SIZE) for _ in range(PROMPT_LEN)]
    request = salted(sampled_request(prompt, NUM_TOKENS, seed=9))
    killed_at, exit_s, num_before, victim = 0.0, 0.0, 0, None
    before: list[float] = []
    after: list[float] = []
    for response in mesh.generation.Generate(request, timeout=60):
        answer.add(response)
        if victim is not None:
            after.append(time.perf_counter())
            continue
        before.append(time.perf_counter())
        if len(answer.tokens.get(0, [])) >= kill_after:
            victim = max(mesh.decodes, key=lambda p: mesh.status(p.address).counts.num_requests)
            num_before = len(answer.tokens[0])
            killed_at = time.perf_counter()
            kill(victim)
            exit_s = time.perf_counter() - killed_at
    assert victim is not None and answer.tokens[0] == expected, "the tokens are not the same"
    usual_s = statistics.median(b - a for a, b in itertools.pairwise(before[2:]))
    ends = (b for a, b in itertools.pairwise([killed_at, *after]) if b - a > BREAK * usual_s)
    resumed_at = next(ends, None)
    assert resumed_at is not None, "the kill was not felt"
    revive(mesh, victim)
    return Kill(silence_s=resumed_at - killed_at, exit_s=exit_s, num_before=num_before)


def measure(model: Path, options: argparse.Namespace) -> list[Kill]:
    """Every kill."""
    rng = random.Random(3)
    flags = options_of_mesh(options)
    with running_mesh(model, num_prefill=1, num_decode=2, **flags) as mesh:
        prompt_rng = random.Random(1)
        prompt = [prompt_rng.randrange(VOCAB_SIZE) for _ in range(PROMPT_LEN)]
        expected = generate(mesh, sampled_request(prompt, NUM_TOKENS, seed=9)).tokens[0]
        books = Books(mesh)
        kills = []
        for turn in range(options.kills):
            kills.append(one_kill(mesh, Answer(), expected, rng.randrange(20, 250)))
            books.lose()
            books.settle(expects_promises=True, timeout_s=30)
            print(f"kill {turn + 1}: {kills[-1]}", flush=True)
        return kills


def main() -> None:
    """Parses flags, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--model", default="models/demo", help="a directory, or qwen3-8b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="auto", help="as of the workers")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="of a prompt, in one step")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lay_out(flags.model, Path(folder))
        kills = measure(Path(folder), flags)
    silences_ms = sorted(1000 * kill.silence_s for kill in kills)
    cpu = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    result = {
        "what": "SIGKILL of a decode rank to the next token at the client, one stream",
        "cpu": platform.machine(),
        **(environment() if flags.device == "cuda" else cpu),
        "model": flags.model,
        "dtype": flags.dtype,
        "num_kills": len(silences_ms),
        "prompt_len": PROMPT_LEN,
        "num_tokens": NUM_TOKENS,
        "p50_ms": round(statistics.median(silences_ms), 1),
        "p99_ms": round(silences_ms[min(len(silences_ms) - 1, int(0.99 * len(silences_ms)))], 1),
        "max_ms": round(silences_ms[-1], 1),
        "process_exit_p50_ms": round(1000 * statistics.median(k.exit_s for k in kills), 1),
        "num_wrong_tokens": 0,
    }
    flags.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
