"""The trace of one request over a real mesh: its tree, its steps, its resume, its log lines."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh import spans
from protos import gateway_pb2
from tests.support.generate import Answer, generate, greedy_request
from tests.support.injectors import kill
from tests.support.mesh import Mesh, Process, running_mesh
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.support.streams import Stream
from tests.support.trace_tree import TraceTree

WAIT_S = 30.0
CANARY = "xylophone quartz"
PARENT_ID = "b7ad6b7169203331"
GATEWAY, PREFILL, DECODE, STORE = "gateway", "prefill", "decode", "kvstore"
CALL = spans.PREFILL_CALL.name
# Who lies under whom, in a trace of a prompt of which the store has the beginning.
EDGES = {
    ((GATEWAY, spans.GENERATE.name), None),
    *(
        ((GATEWAY, name), (GATEWAY, spans.GENERATE.name))
        for name in ("queue", CALL, "decode", "handover", "first_step")
    ),
    ((PREFILL, CALL), (GATEWAY, CALL)),
    *(((PREFILL, name), (PREFILL, CALL)) for name in ("queue", "pull", "prefill", "put")),
    *(((PREFILL, name), (PREFILL, "pull")) for name in ("lookup", "get", "verify")),
    ((PREFILL, "chunk"), (PREFILL, "prefill")),
    ((PREFILL, "publish"), (PREFILL, CALL)),
    *(((PREFILL, name), (PREFILL, "publish")) for name in ("write", "seal")),
    ((STORE, "kvmesh.v1.KvStoreService/Lookup"), (PREFILL, "lookup")),
    ((STORE, "kvmesh.v1.KvStoreService/Seal"), (PREFILL, "seal")),
    ((DECODE, "decode"), (GATEWAY, "decode")),
    *(((DECODE, name), (DECODE, "pull")) for name in ("lookup", "get", "verify")),
    ((STORE, "kvmesh.v1.KvStoreService/Lookup"), (DECODE, "lookup")),
    ((DECODE, "publish"), (DECODE, "decode")),
}


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    receiver.start()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def mesh(tiny_model: Path, receiver: OtlpReceiver) -> Iterator[Mesh]:
    """Two ranks; every second step is told of."""
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        "KVMESH_TRACE_STEP_INTERVAL": "2",
        "KVMESH_LOG_FORMAT": "json",
        "KVMESH_LOG_LEVEL": "debug",
    }
    flags = ("--chunk-tokens", "64")
    with running_mesh(tiny_model, num_decode=2, worker_flags=flags, env=env) as mesh:
        yield mesh


def named(request: gateway_pb2.GenerateRequest) -> gateway_pb2.GenerateRequest:
    """The request under an id by which its trace is found."""
    request.request_id = secrets.token_hex(8)
    return request


def edges(tree: TraceTree) -> set[tuple[Any, Any]]:
    def place(span: ReceivedSpan | None) -> tuple[str, str] | None:
        return (span.service.removeprefix("kvmesh-"), span.name) if span else None

    return {(place(span), place(tree.parent(span))) for span in tree.spans}


def when(receiver: OtlpReceiver, request_id: str, condition: Any) -> TraceTree:
    """The trace, once the condition holds for it."""
    receiver.wait_until(lambda: condition(TraceTree.of_request(receiver, request_id)), WAIT_S)
    return TraceTree.of_request(receiver, request_id)


def log_lines(process: Process) -> list[dict[str, Any]]:
    lines = [line for line in process.lines if line.startswith("{")]
    return [json.loads(line) for line in lines]


def test_a_request_is_one_tree_of_spans(mesh: Mesh, receiver: OtlpReceiver) -> None:
    prompt = list(range(3, 203))
    generate(mesh, greedy_request(prompt[:130], 2))
    request = named(greedy_request(prompt, 80))
    trace_id = secrets.token_hex(16)
    answer = Answer()
    for response in mesh.generation.Generate(
        request, metadata=(("traceparent", f"00-{trace_id}-{PARENT_ID}-01"),), timeout=60
    ):
        answer.add(response)
    tree = when(receiver, request.request_id, lambda tree: edges(tree) >= EDGES)
    assert tree.root.trace_id == trace_id and tree.root.parent_id == PARENT_ID
    assert len(tree.named("chunk")) == 2  # 72 tokens, 64 a chunk
    kinds = {s.kind for s in tree.named(CALL)}, {s.kind for s in tree.named("decode")}
    assert kinds == ({"CLIENT", "SERVER"}, {"CLIENT", "SERVER"})
    assert not [span.name for span in tree.spans if span.is_error]
    assert (
        tree.root.attributes.items()
        >= {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": tiny_name(mesh),
            "gen_ai.request.max_tokens": 80,
            "gen_ai.request.temperature": 0.0,
            "gen_ai.usage.input_tokens": 200,
            "gen_ai.usage.cache_read.input_tokens": 128,
            "gen_ai.usage.output_tokens": 80,
            "rpc.response.status_code": "OK",
            "kvmesh.request.state": "completed",
        }.items()
    )
    assert tree.root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert answer.usage is not None
    first_s = tree.root.attributes["gen_ai.response.time_to_first_chunk"]
    assert first_s == answer.usage.first_token_s
    parts = tree.first_token_parts_s()
    assert parts["prefill"] == pytest.approx(answer.usage.prefill_s, abs=1e-6)
    assert parts["put"] == pytest.approx(answer.usage.put_s, abs=1e-6)


def test_spans_say_what_is_declared_and_nothing_of_the_prompt(
    mesh: Mesh, receiver: OtlpReceiver
) -> None:
    request = named(gateway_pb2.GenerateRequest(text=CANARY, cache_salt=CANARY))
    request.stopping.max_new_tokens = 4
    request.stopping.stop_strings.append(CANARY)
    text = generate(mesh, request).text
    assert CANARY not in text
    when(receiver, request.request_id, lambda tree: tree.named("decode", service=DECODE))
    declared = {(s.name, s.kind.name): {*s.attributes, *s.fixed} for s in spans.ALL}
    any_call = declared.pop((spans.SERVER_CALL.name, "SERVER"))
    for span in list(receiver.spans):
        allowed = declared.get((span.name, span.kind))
        if allowed is None:
            assert span.name.startswith("kvmesh.v1.") and span.kind == "SERVER", span.name
            allowed = any_call
        assert set(span.attributes) <= allowed, span.name
    told = json.dumps([span.attributes for span in list(receiver.spans)])
    logged = "\n".join(line for process in mesh.processes for line in process.lines)
    for word in CANARY.split():
        assert word not in told and word not in logged


def test_steps_link_to_the_requests_in_them(mesh: Mesh, receiver: OtlpReceiver) -> None:
    requests = [named(greedy_request(list(range(n, n + 40)), 300)) for n in (5, 90, 180)]
    streams = [Stream(mesh.generation, request) for request in requests]
    for stream in streams:
        stream.result()
    ids: set[tuple[str, str]] = set()
    for request in requests:
        tree = when(receiver, request.request_id, lambda tree: tree.named("decode", service=DECODE))
        (span,) = tree.named("decode", service=DECODE)
        ids.add((span.trace_id, span.span_id))
    steps = [s for s in receiver.spans_named("step") if ids & set(s.links)]
    assert {link for step in steps for link in step.links} == ids
    assert any(len(step.links) == 2 for step in steps), "no rank had two of three requests"
    for step in steps:
        assert step.attributes[spans.STEP] % 2 == 0 and step.parent_id == ""
        assert step.attributes[spans.SEQUENCES] == len(step.links)
        assert step.attributes[spans.TOKENS] == len(step.links)
        assert step.attributes["kvmesh.step.forward_s"] > 0
        assert all(step.trace_id != trace_id for trace_id, _ in step.links)


def test_an_unsampled_caller_gets_no_spans(mesh: Mesh, receiver: OtlpReceiver) -> None:
    unsampled, later = secrets.token_hex(16), named(greedy_request([4, 5, 6], 3))
    metadata = (("traceparent", f"00-{unsampled}-{PARENT_ID}-00"),)
    assert list(mesh.generation.Generate(greedy_request([4, 5, 7], 3), metadata=metadata))
    generate(mesh, later)
    when(receiver, later.request_id, lambda tree: tree.named("decode", service=DECODE))
    assert not receiver.trace(unsampled)


def test_log_lines_of_a_request_carry_its_trace(mesh: Mesh, receiver: OtlpReceiver) -> None:
    request = named(greedy_request([7, 8, 9], 3))
    generate(mesh, request)
    tree = when(receiver, request.request_id, lambda tree: bool(tree.spans))
    lines = [x for x in log_lines(mesh.gateway) if request.request_id in x["message"]]
    assert [line["trace_id"] for line in lines] == [tree.root.trace_id]
    assert lines[0]["span_id"] == tree.root.span_id


def test_a_resume_is_a_second_attempt_in_the_same_trace(mesh: Mesh, receiver: OtlpReceiver) -> None:
    """Last in this module: a rank dies."""
    request = greedy_request(list(range(50, 150)), 400)
    expected = generate(mesh, request).tokens
    stream = Stream(mesh.generation, named(request))
    stream.wait_tokens(20)
    kill(max(mesh.decodes, key=lambda p: mesh.status(p.address).counts.num_requests))
    assert stream.result().tokens == expected
    tree = when(receiver, request.request_id, lambda tree: tree.named("decode", service=DECODE))
    lost, resumed = tree.named("decode", service=GATEWAY)
    assert lost.is_error and lost.attributes[spans.ERROR_TYPE] == "RANK_LOST"
    assert lost.attributes[spans.ATTEMPT] == 1 and spans.CAUSE not in lost.attributes
    assert not resumed.is_error and resumed.attributes[spans.ATTEMPT] == 2
    assert resumed.attributes[spans.CAUSE] == "RANK_LOST"
    (at_rank,) = tree.named("decode", service=DECODE)
    assert at_rank.parent_id == resumed.span_id
    assert at_rank.attributes[spans.RESUMED_TOKENS] >= 20
    assert not tree.root.is_error and tree.root.attributes[spans.OUTPUT_TOKENS] == 400
    (line,) = [
        x for x in log_lines(mesh.gateway) if f"request {request.request_id}: " in x["message"]
    ]
    assert line["level"] == "warning" and line["trace_id"] == tree.root.trace_id


def tiny_name(mesh: Mesh) -> str:
    """What clients call the model."""
    return mesh.model.name
