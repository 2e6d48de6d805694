"""One request's trace as a waterfall, and how well its parts add up to the time to first token.

    python -m benchmarks.trace_request --out benchmarks/results/trace_request.json

Runs a mesh of processes and one OTLP receiver, and sends prompts cold and then warm, one at a time.
Correctness first: both answers of a prompt are the same tokens, and every trace is whole. The parts
are durations of spans of two processes plus the gateway's figure for the messages between them;
their sum is compared with the time to first token as the gateway measured it. That figure is a
difference of durations; it is compared with the two gaps that the spans leave on this machine's
clock. The client's own time has its messages to and from the gateway on top.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.engine_case import prompts_of
from benchmarks.transfer_bandwidth import cpu_name
from mesh import spans
from tests.support.generate import Answer, greedy_request
from tests.support.mesh import ROOT, Mesh, running_mesh
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.trace_tree import TraceTree

PROMPT_LEN, NUM_TOKENS, VOCAB_SIZE = 300, 16, 4096
NUM_CHECKS = 2  # prompts before those that count
WAIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """One request: when the client sent it and had its first token, and its trace's id."""

    kind: str
    trace_id: str
    sent_ns: int
    first_ns: int
    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Milliseconds of one request; errors are the sum of its parts less what was measured."""

    parts_ms: dict[str, float]
    first_token_ms: float
    client_ms: float
    to_gateway_ms: float
    from_gateway_ms: float
    gaps_ms: float

    @property
    def gateway_error_ms(self) -> float:
        """Against the gateway's time to first token."""
        return sum(self.parts_ms.values()) - self.first_token_ms

    @property
    def wire_error_ms(self) -> float:
        """Of the messages between gateway and prefill, against the gaps between their spans."""
        return self.parts_ms["wire"] - self.gaps_ms

    @property
    def client_error_ms(self) -> float:
        """Against the client's, with the messages between client and gateway."""
        messages_ms = self.to_gateway_ms + self.from_gateway_ms
        return sum(self.parts_ms.values()) + messages_ms - self.client_ms


def ask(mesh: Mesh, kind: str, prompt: list[int]) -> Traced:
    """Runs one greedy request under a trace of its own to its end."""
    trace_id, answer, first_ns = secrets.token_hex(16), Answer(), 0
    metadata = (("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01"),)
    request = greedy_request(prompt, NUM_TOKENS)
    sent_ns = time.time_ns()
    for response in mesh.generation.Generate(request, metadata=metadata, timeout=60):
        if not first_ns and response.delta.token_ids:
            first_ns = time.time_ns()
        answer.add(response)
    return Traced(
        kind=kind,
        trace_id=trace_id,
        sent_ns=sent_ns,
        first_ns=first_ns,
        token_ids=answer.tokens[0],
    )


def ask_all(mesh: Mesh, num_requests: int) -> list[Traced]:
    """Every prompt cold, then warm; ValueError when the two answers differ."""
    traced = []
    for prompt in prompts_of(NUM_CHECKS + num_requests, PROMPT_LEN, VOCAB_SIZE, seed=5):
        cold, warm = (ask(mesh, kind, prompt) for kind in ("cold", "warm"))
        if cold.token_ids != warm.token_ids:
            raise ValueError(f"{cold.token_ids} cold, {warm.token_ids} warm")
        traced += [cold, warm]
    return traced[2 * NUM_CHECKS :]


def is_whole(receiver: OtlpReceiver, request: Traced) -> bool:
    """Whether the spans of all processes have come: the rank's own ends last."""
    tree = TraceTree(receiver.trace(request.trace_id))
    has_root = bool(tree.named(spans.GENERATE.name))
    return has_root and bool(tree.named("decode", service="decode") and tree.named("publish"))


def sums_of(tree: TraceTree, request: Traced) -> Sums:
    """ValueError when the trace does not say whether its prompt was cold."""
    attributes, start_ns = tree.root.attributes, tree.root.start_ns
    if bool(attributes[spans.CACHED_TOKENS]) != (request.kind == "warm"):
        raise ValueError(f"{request.kind}: {attributes[spans.CACHED_TOKENS]} tokens from the store")
    first_token_s = attributes[spans.FIRST_TOKEN_S]
    (queue,), (there,) = (tree.named("queue", service=role) for role in ("gateway", "prefill"))
    (put,) = tree.named("put")
    first_ns = queue.start_ns + first_token_s * 1e9
    return Sums(
        parts_ms={name: 1e3 * part_s for name, part_s in tree.first_token_parts_s().items()},
        first_token_ms=1e3 * first_token_s,
        client_ms=(request.first_ns - request.sent_ns) / 1e6,
        to_gateway_ms=(start_ns - request.sent_ns) / 1e6,
        from_gateway_ms=(request.first_ns - first_ns) / 1e6,
        gaps_ms=(there.start_ns - queue.end_ns + first_ns - put.end_ns) / 1e6,
    )


def waterfall(tree: TraceTree) -> list[dict[str, object]]:
    """Every span below its parent, in milliseconds from the start of the first."""
    return [
        {
            "span": "  " * tree.depth(span) + span.name.removeprefix("kvmesh.v1."),
            "process": span.service.removeprefix("kvmesh-"),
            "start_ms": round((span.start_ns - tree.root.start_ns) / 1e6, 3),
            "ms": round((span.end_ns - span.start_ns) / 1e6, 3),
        }
        for span in tree.walk()
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of magnitudes."""
    ordered = sorted(abs(value) for value in values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {
        "p50": round(statistics.median(ordered), 4),
        "p99": round(p99, 4),
        "max": round(ordered[-1], 4),
    }


def row_of(kind: str, sums: list[Sums]) -> dict[str, object]:
    """Medians of the parts, and the spread of the errors."""
    names = sums[0].parts_ms
    return {
        "kind": kind,
        "num_requests": len(sums),
        "first_token_ms_p50": round(statistics.median(s.first_token_ms for s in sums), 3),
        "parts_ms_p50": {
            name: round(statistics.median(s.parts_ms[name] for s in sums), 3) for name in names
        },
        "sum_against_gateway_ms": spread([s.gateway_error_ms for s in sums]),
        "client_to_gateway_ms_p50": round(statistics.median(s.to_gateway_ms for s in sums), 3),
        "gateway_to_client_ms_p50": round(statistics.median(s.from_gateway_ms for s in sums), 3),
        "wire_against_gaps_ms": spread([s.wire_error_ms for s in sums]),
        "sum_against_client_ms": spread([s.client_error_ms for s in sums]),
        "client_minus_gateway_ms": spread([s.client_ms - s.first_token_ms for s in sums]),
    }


def show(rows: list[dict[str, object]]) -> None:
    """A bar a span, 60 characters wide."""
    whole_ms = max(float(str(row["start_ms"])) + float(str(row["ms"])) for row in rows)
    for row in rows:
        start, length = (float(str(row[key])) * 60 / whole_ms for key in ("start_ms", "ms"))
        bar = (" " * round(start) + "#" * max(1, round(length)))[:61]
        print(f"{row['span']!s:44} {row['process']!s:8} {row['ms']:>9} ms |{bar:61}|")


def measure(num_requests: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """The waterfall of a warm request, and a row a kind."""
    receiver = OtlpReceiver()
    env = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.start()}
    try:
        with running_mesh(ROOT / "models" / "demo", env=env) as mesh:
            traced = ask_all(mesh, num_requests)
            receiver.wait_until(lambda: all(is_whole(receiver, r) for r in traced), WAIT_S)
    finally:
        receiver.close()
    trees = {request.trace_id: TraceTree(receiver.trace(request.trace_id)) for request in traced}
    rows = []
    for kind in ("cold", "warm"):
        of_kind = [request for request in traced if request.kind == kind]
        rows.append(row_of(kind, [sums_of(trees[r.trace_id], r) for r in of_kind]))
    return waterfall(trees[traced[-1].trace_id]), rows


def main() -> None:
    """Measures, shows and writes."""
    parser = argparse.ArgumentParser(description="A request's trace, and the sum of its parts")
    parser.add_argument("--requests", type=int, default=50, help="of each kind")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    bars, rows = measure(options.requests)
    show(bars)
    print(json.dumps(rows, indent=2))
    if options.out is not None:
        result = {
            "what": "a request's spans: parts up to the first token against the time to first "
            "token, one request at a time; client, receiver and mesh on one machine",
            "machine": f"{platform.machine()}, {cpu_name()}",
            "load_average_1min_before": load,
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "model": "models/demo",
            "prompt_len": PROMPT_LEN,
            "num_tokens": NUM_TOKENS,
            "rows": rows,
            "waterfall_of_a_warm_request": bars,
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
