"""Every span of kvmesh, declared once: name, kind, who makes it and what it may say of itself.

Names and attributes follow OpenTelemetry's GenAI and RPC conventions where they exist, else
`kvmesh.*`. Never a prompt, a token, a stop string or a salt. docs/telemetry.md is generated from
this module (`make docs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from opentelemetry.trace import SpanKind

RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS = "rpc.response.status_code"
ERROR_TYPE = "error.type"
SERVER_ADDRESS, SERVER_PORT = "server.address", "server.port"
OPERATION, PROVIDER, MODEL = "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"
RESPONSE_ID = "gen_ai.response.id"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE, TOP_P, TOP_K = (
    "gen_ai.request.temperature",
    "gen_ai.request.top_p",
    "gen_ai.request.top_k",
)
PRESENCE_PENALTY = "gen_ai.request.presence_penalty"
FREQUENCY_PENALTY = "gen_ai.request.frequency_penalty"
CHOICE_COUNT = "gen_ai.request.choice.count"
FINISH_REASONS = "gen_ai.response.finish_reasons"
FIRST_TOKEN_S = "gen_ai.response.time_to_first_chunk"
WIRE_S = "kvmesh.wire_s"
INPUT_TOKENS, OUTPUT_TOKENS = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
REQUEST_ID, STATE = "kvmesh.request.id", "kvmesh.request.state"
ATTEMPT, CAUSE = "kvmesh.attempt", "kvmesh.cause"
KEYS, BLOCKS, FAILURES = "kvmesh.keys", "kvmesh.blocks", "kvmesh.failures"
TOKENS, POSITION, SEQUENCES = "kvmesh.tokens", "kvmesh.position", "kvmesh.sequences"
PULLED_TOKENS, RESUMED_TOKENS = "kvmesh.pulled_tokens", "kvmesh.resumed_tokens"
STEP = "kvmesh.step"
STEP_PARTS = {
    part: f"kvmesh.step.{part}_s" for part in ("schedule", "forward", "sample", "emit", "gap")
}

ATTRIBUTES: Mapping[str, str] = {
    RPC_SYSTEM: "always grpc",
    RPC_METHOD: "service and method, fully qualified",
    RPC_STATUS: "name of the gRPC status, OK included",
    ERROR_TYPE: "reason of the error (mesh/errors.py); the span's status is error where it is ours",
    SERVER_ADDRESS: "host of the instance that is called",
    SERVER_PORT: "its port",
    OPERATION: "chat or text_completion",
    PROVIDER: "always kvmesh",
    MODEL: "name of the model",
    RESPONSE_ID: "id of the request",
    MAX_TOKENS: "most tokens of a sequence, where the client said it",
    TEMPERATURE: "as served, defaults filled in",
    TOP_P: "as served",
    TOP_K: "as served; 0 is off",
    PRESENCE_PENALTY: "as served",
    FREQUENCY_PENALTY: "as served",
    CHOICE_COUNT: "number of sequences",
    FINISH_REASONS: "of each sequence: length, stop_token, eos, stop_string, aborted",
    FIRST_TOKEN_S: "seconds from arrival to the first token",
    WIRE_S: "of those, seconds of phase wire: the gaps around what prefill did",
    INPUT_TOKENS: "tokens of the prompt",
    OUTPUT_TOKENS: "tokens generated, over all sequences",
    CACHED_TOKENS: "prompt tokens whose KV came from the store",
    REQUEST_ID: "id of the request",
    STATE: "how it ended: completed, aborted, cancelled, failed, rejected",
    ATTEMPT: "1 for the first try, 2 for the first retry or resume",
    CAUSE: "from the second try on: error.type of the one before",
    KEYS: "blocks asked for",
    BLOCKS: "blocks that are in place and verified, or sealed",
    FAILURES: "why blocks were not used, as in kvmesh.kv.verify.failures",
    TOKENS: "tokens computed, or delivered by a step",
    POSITION: "of the chunk's first token in the prompt",
    SEQUENCES: "number of sequences",
    PULLED_TOKENS: "tokens whose KV was pulled and verified; the others are computed again",
    RESUMED_TOKENS: "of an exact resume: tokens generated before, over all sequences",
    STEP: "number of the engine's step",
    **{name: f"seconds: {part}" for part, name in STEP_PARTS.items()},
}
_RPC = (RPC_SYSTEM, RPC_METHOD, RPC_STATUS, ERROR_TYPE)
_CALL = (*_RPC, SERVER_ADDRESS, SERVER_PORT, ATTEMPT, CAUSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanType:
    """A span's declaration; `made_by` are the roles of processes that make it."""

    name: str
    made_by: tuple[str, ...]
    description: str
    attributes: tuple[str, ...] = ()
    kind: SpanKind = SpanKind.INTERNAL
    rpc_method: str = ""

    @property
    def fixed(self) -> dict[str, str]:
        """Attributes that it always has."""
        return {RPC_SYSTEM: "grpc", RPC_METHOD: self.rpc_method} if self.rpc_method else {}


def _rpc(service: str, method: str) -> str:
    return f"kvmesh.v1.{service}/{method}"


SERVER_CALL = SpanType(
    name="kvmesh.v1.<service>/<method>",
    made_by=("gateway", "prefill", "kvstore"),
    kind=SpanKind.SERVER,
    description="one call that a process answers, under the caller's span; not of status, Session "
    "and Watch",
    attributes=_RPC,
)
GENERATE = SpanType(
    name=_rpc("GenerationService", "Generate"),
    made_by=("gateway",),
    kind=SpanKind.SERVER,
    description="a request, from arrival to the last message; under the client's own traceparent, "
    "else the root of the trace",
    attributes=(
        *_RPC, OPERATION, PROVIDER, MODEL, RESPONSE_ID, MAX_TOKENS, TEMPERATURE, TOP_P, TOP_K,
        PRESENCE_PENALTY, FREQUENCY_PENALTY, CHOICE_COUNT, FINISH_REASONS, FIRST_TOKEN_S, WIRE_S,
        INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS, STATE,
    ),
)  # fmt: skip
QUEUE = SpanType(
    name="queue",
    made_by=("gateway", "prefill"),
    description="arrival at the gateway until the instance that answers is called (tokenizing, the "
    "choice, failed attempts); arrival there until it has memory",
)
PREFILL_CALL = SpanType(
    name=_rpc("PrefillService", "Prefill"),
    made_by=("gateway",),
    kind=SpanKind.CLIENT,
    description="one attempt at prefill, on one instance",
    attributes=_CALL,
    rpc_method=_rpc("PrefillService", "Prefill"),
)
HANDOVER = SpanType(
    name="handover",
    made_by=("gateway",),
    description="first token until a decode rank has the KV",
)
FIRST_STEP = SpanType(
    name="first_step", made_by=("gateway",), description="from there to the second token"
)
DECODE_CALL = SpanType(
    name="decode",
    made_by=("gateway",),
    kind=SpanKind.CLIENT,
    description="a request's stay on one rank; the second and later ones are exact resumes",
    attributes=_CALL,
    rpc_method=_rpc("DecodeService", "Session"),
)
PREFILL = SpanType(
    name="prefill",
    made_by=("prefill",),
    description="the prompt is with the engine, until its last chunk is computed",
    attributes=(TOKENS,),
)
CHUNK = SpanType(
    name="chunk",
    made_by=("prefill",),
    description="one chunk of the prompt computes, in one step of the engine",
    attributes=(STEP, TOKENS, POSITION, SEQUENCES),
)
PUT = SpanType(
    name="put",
    made_by=("prefill",),
    description="last chunk computed until the hand-off; the blocks' own way (publish) goes on "
    "beside it",
)
PULL = SpanType(
    name="pull",
    made_by=("prefill", "decode"),
    description="blocks are brought from the store; a tail has its own",
    attributes=(KEYS, BLOCKS, FAILURES, ERROR_TYPE),
)
LOOKUP = SpanType(
    name="lookup",
    made_by=("prefill", "decode"),
    kind=SpanKind.CLIENT,
    description="the stores are asked which blocks they have, and lease them",
    rpc_method=_rpc("KvStoreService", "Lookup"),
    attributes=(RPC_SYSTEM, RPC_METHOD),
)
GET = SpanType(name="get", made_by=("prefill", "decode"), description="their bytes are moved here")
VERIFY = SpanType(
    name="verify",
    made_by=("prefill", "decode"),
    description="leases are confirmed and digests compared",
)
PUBLISH = SpanType(
    name="publish",
    made_by=("prefill", "decode"),
    description="blocks that were computed go to the store; those a rank fills lie under its "
    "decode span",
    attributes=(KEYS, BLOCKS),
)
WRITE = SpanType(
    name="write",
    made_by=("prefill", "decode"),
    description="their bytes are written into one store",
    attributes=(BLOCKS, ERROR_TYPE),
)
SEAL = SpanType(
    name="seal",
    made_by=("prefill", "decode"),
    kind=SpanKind.CLIENT,
    description="one store is told that they are whole",
    rpc_method=_rpc("KvStoreService", "Seal"),
    attributes=(RPC_SYSTEM, RPC_METHOD, BLOCKS),
)
PREFETCH = SpanType(
    name="prefetch",
    made_by=("decode",),
    kind=SpanKind.SERVER,
    description="a rank pulls a prompt's KV while prefill computes the last chunk",
    attributes=(REQUEST_ID, ERROR_TYPE),
)
DECODE = SpanType(
    name="decode",
    made_by=("decode",),
    kind=SpanKind.SERVER,
    description="a request on a rank, from its admission to the end of its last sequence there",
    attributes=(REQUEST_ID, SEQUENCES, PULLED_TOKENS, RESUMED_TOKENS, ERROR_TYPE),
)
DECODE_STEP = SpanType(
    name="step",
    made_by=("decode",),
    description="one decode step in --trace-step-interval, a trace of its own; linked to the "
    "decode spans of the requests in it",
    attributes=(STEP, SEQUENCES, TOKENS, *STEP_PARTS.values()),
)
ALL = (
    GENERATE, QUEUE, PREFILL_CALL, HANDOVER, FIRST_STEP, DECODE_CALL, SERVER_CALL, PREFILL, CHUNK,
    PUT, PULL, LOOKUP, GET, VERIFY, PUBLISH, WRITE, SEAL, PREFETCH, DECODE, DECODE_STEP,
)  # fmt: skip


def server_call(method: str) -> SpanType:
    """The span of a call of /package.Service/Method that this process answers."""
    name = method.removeprefix("/")
    kind = GENERATE if name == GENERATE.name else SERVER_CALL
    return replace(kind, name=name, rpc_method=name)
