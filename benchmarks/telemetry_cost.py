"""What telemetry costs a decode step: the engine and a rank's step meter, exporting or not.

On: the SDK, OTLP over gRPC to a receiver in a process of its own, and a Prometheus port that it
scrapes, both once a second (five times as often as the default). Off: no exporter, as a process
without any telemetry setting; the meter's sums for StatusService are kept either way. On and off
take turns (on, off, off, on) in one run, and the cost is the median of the ratios of neighbours, so
that a noisy machine disturbs both. Both must give the same tokens.

    python -m benchmarks.telemetry_cost [--device cuda] [--streams N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu.engine_case import Run, load_dummy, prompts_of, run_engine
from engine.cuda_runner import CudaRunner
from engine.engine import Engine
from engine.runner import ModelRunner
from engine.sequence import StepOutcome
from mesh.service_settings import ServiceSettings
from mesh.telemetry import Telemetry
from services.decode.step_meter import StepMeter
from services.worker_process import SWITCH_INTERVAL_S
from tests.support.mesh import ROOT
from tests.support.otlp_receiver import OtlpReceiver

INTERVAL_MS = 1000
PROMPT_LEN = 64
MUST = {"cpu": 0.02, "cuda": 0.005}
"""Share of a decode step."""
STREAMS = {"cpu": (1, 8), "cuda": (64,)}


class Meter:
    """A rank's step meter and the seconds that it took for each step."""

    def __init__(self, engine: Engine, telemetry: Telemetry) -> None:
        self._meter = StepMeter(engine, telemetry)
        self.times: list[float] = []

    def on_step(self, outcome: StepOutcome) -> None:
        """Books a step."""
        started_at = time.perf_counter()
        self._meter.record(outcome)
        self.times.append(time.perf_counter() - started_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Seconds of the mean step, by the wall and of this process's CPUs, and of the median call of
    the meter; every sequence's tokens.
    """

    step_s: float
    cpu_s: float
    meter_s: float
    outputs: list[list[int]]


class Sink:
    """A process that accepts OTLP and scrapes a port."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        self.endpoint: str = self._pipe.recv()

    def scrape(self, port: int | None) -> int:
        """Scrapes that port from now on; returns how many exports and scrapes came so far."""
        self._pipe.send(port)
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection) -> None:
    receiver = OtlpReceiver()
    pipe.send(receiver.start())
    port, num_scrapes = None, 0
    while True:
        if pipe.poll(INTERVAL_MS / 1000 if port else None):
            port = pipe.recv()
            num_exports = len(receiver.metric_points("kvmesh.decode.step.tokens"))
            pipe.send(num_exports + num_scrapes)
        if port:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                num_scrapes += b"kvmesh_decode_step_tokens_sum" in answer.read()


@contextmanager
def exporting(sink: Sink) -> Any:
    """Telemetry as a decode process has it; fails when nothing came of it."""
    telemetry = Telemetry.start(
        role="decode",
        incarnation="benchmark",
        settings=ServiceSettings(
            otlp_endpoint=sink.endpoint,
            otlp_interval_ms=INTERVAL_MS,
            metrics_exporter=("otlp", "prometheus"),
            metrics_port=0,
        ),
    )
    before = sink.scrape(telemetry.metrics_port)
    try:
        yield telemetry
    finally:
        num_received = sink.scrape(None) - before
        telemetry.close()
    if num_received < 2:
        raise RuntimeError(f"{num_received} exports and scrapes in a turn: make turns longer")


def turn(
    run: Callable[..., Run], num_outputs: int, telemetry: AbstractContextManager[Telemetry]
) -> Turn:
    """All streams once, and the mean step from the first token of all to the end of one."""
    meters: list[Meter] = []

    def listener(engine: Engine) -> Callable[[StepOutcome], None]:
        meters.append(Meter(engine, told))
        return meters[0].on_step

    with telemetry as told:
        began_s = time.process_time()
        done = run(listener=listener)
        cpu_s = time.process_time() - began_s
    return Turn(
        step_s=done.step_s(2, num_outputs),
        cpu_s=cpu_s / len(done.times),
        meter_s=statistics.median(meters[0].times),
        outputs=done.outputs,
    )


def case(
    runner: CudaRunner | ModelRunner, device: str, num_streams: int, num_outputs: int, rounds: int
) -> dict[str, object]:
    """One row of the result; RuntimeError when tokens depend on telemetry."""
    prompts = prompts_of(num_streams, PROMPT_LEN, runner.config.vocab_size)

    def run(**options: Any) -> Run:
        return run_engine(runner, prompts, num_outputs, **options)

    with closing(Sink()) as sink:

        def measure(is_on: bool) -> Turn:
            told = exporting(sink) if is_on else nullcontext(Telemetry.off())
            return turn(run, num_outputs, told)

        measure(is_on=False)  # warm
        order = (True, False, False, True) * rounds
        turns = [measure(is_on) for is_on in order]
    if any(one.outputs != turns[0].outputs for one in turns):
        raise RuntimeError("tokens depend on telemetry")
    on = [one for one, is_on in zip(turns, order, strict=True) if is_on]
    off = [one for one, is_on in zip(turns, order, strict=True) if not is_on]
    row = {"device": device, "streams": num_streams, **compare(on, off, MUST[device])}
    print(json.dumps(row), flush=True)
    return row


def compare(on: list[Turn], off: list[Turn], must: float) -> dict[str, object]:
    """Costs of neighbours, and the medians of both kinds of turns."""
    costs = sorted(a.step_s / b.step_s - 1 for a, b in zip(on, off, strict=True))
    cpu_costs = [a.cpu_s / b.cpu_s - 1 for a, b in zip(on, off, strict=True)]
    cost = statistics.median(costs)
    quarter = len(costs) // 4
    return {
        "turns": len(on) + len(off),
        "step_off_ms": round(statistics.median(t.step_s for t in off) * 1e3, 4),
        "step_on_ms": round(statistics.median(t.step_s for t in on) * 1e3, 4),
        "meter_off_us": round(statistics.median(t.meter_s for t in off) * 1e6, 2),
        "meter_on_us": round(statistics.median(t.meter_s for t in on) * 1e6, 2),
        "cpu_off_ms": round(statistics.median(t.cpu_s for t in off) * 1e3, 4),
        "cpu_on_ms": round(statistics.median(t.cpu_s for t in on) * 1e3, 4),
        "cpu_cost": round(statistics.median(cpu_costs), 5),
        "cost": round(cost, 5),
        "cost_quartiles": [round(costs[quarter], 5), round(costs[-1 - quarter], 5)],
        "must": must,
        "ok": cost <= must,
    }


def load(device: str) -> CudaRunner | ModelRunner:
    """The demo model on a CPU, random FP8 weights of Qwen3-8B's shape on a GPU."""
    if device == "cuda":
        return load_dummy(dtype="fp8", max_batch=64, chunk_tokens=8192)
    torch.set_num_threads(1)
    return ModelRunner.load(
        ROOT / "models/demo",
        device="cpu",
        dtype="fp32",
        kv_bytes=512 * 2**20,
        block_tokens=64,
        progress=lambda _: None,
    )


def main() -> None:
    """Prints a row per number of streams; with --out writes them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--streams", type=int, nargs="*")
    parser.add_argument("--outputs", type=int, default=900, help="tokens of a stream a turn")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of four turns")
    parser.add_argument("--out")
    given = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as a worker has it
    runner = load(given.device)
    rows = [
        case(runner, given.device, num_streams, given.outputs, given.rounds)
        for num_streams in given.streams or STREAMS[given.device]
    ]
    if given.out:
        where = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        made = {"what": "telemetry_cost", "hardware": where, **versions}
        made |= {"date": time.strftime("%Y-%m-%d"), "rows": rows}
        with open(given.out, "w") as file:
            json.dump(made, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
