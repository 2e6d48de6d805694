"""Every metric of kvmesh, declared once: name, unit, buckets and the values of its attributes.

Names follow OpenTelemetry's GenAI conventions where they exist, else `kvmesh.*`. Recorded per step
or per request, never per token; request ids are never attributes. docs/telemetry.md is generated
from this module (`make docs`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

from opentelemetry.metrics import Counter, Histogram, Meter

from mesh import buckets
from mesh.metric import Kind, Metric, counter, histogram, observed

ERROR_REASON = ("<reason of an error>",)
"""The reasons of mesh/errors.py and of whoever raises them: upper case, a few dozen in all."""
ROLES = ("prefill", "decode", "kvstore")
DISPOSITIONS = ("delivered", "cancelled", "discarded", "recomputed")
STEP_PARTS = ("schedule", "forward", "sample", "emit")
TO_FIRST_TOKEN = ("queue", "lookup", "get", "verify", "prefill", "put", "wire")
TO_SECOND_TOKEN = ("handover", "first_step")
STAGES = ("first_token", "second_token")
PHASES = tuple(dict.fromkeys((*TO_FIRST_TOKEN, *TO_SECOND_TOKEN)))
TIERS = ("memory", "dram", "disk")
VERIFY_REASONS = (
    "lookup", "slot", "timeout", "read", "lease", "digest", "identity", "reported_corrupt",
    "disk_start", "disk_read", "disk_header", "disk_digest", "disk_copy", "disk_full",
    "disk_write", "host_read", "host_write",
)  # fmt: skip


GATEWAY = {
    "time_to_first_token": histogram(
        "gen_ai.server.time_to_first_token", "s", "arrival to first token", buckets.FIRST_TOKEN_S
    ),
    "time_per_output_token": histogram(
        "gen_ai.server.time_per_output_token", "s", "mean after the first", buckets.PER_TOKEN_S
    ),
    "request_duration": histogram(
        "gen_ai.server.request.duration",
        "s",
        "arrival to the last message",
        buckets.REQUEST_S,
        state=("completed", "aborted", "cancelled", "failed", "rejected"),
    ),
    "phase_duration": histogram(
        "kvmesh.phase.duration",
        "s",
        "one phase of a request; those of stage first_token add up to its time to first token, "
        "those of second_token to the time from there to the second one; wire: messages between "
        "gateway and prefill, both ways, and waits for their event loops",
        buckets.FIRST_TOKEN_S,
        stage=STAGES,
        phase=PHASES,
    ),
    "stream_backpressure": histogram(
        "kvmesh.stream.backpressure.duration",
        "s",
        "of a request: its client took nothing while something was there for it",
        buckets.REQUEST_S,
    ),
    "requests": counter(
        "kvmesh.requests",
        "{request}",
        "requests that ended",
        state=("completed", "aborted", "cancelled", "failed", "rejected"),
    ),
    "requests_rejected": counter(
        "kvmesh.requests.rejected", "{request}", "refused", reason=ERROR_REASON
    ),
    "retries": counter(
        "kvmesh.retries",
        "{retry}",
        "second tries",
        phase=("prefill", "decode"),
        reason=ERROR_REASON,
    ),
}
STEPS = {
    "decode_step_tokens": histogram(
        "kvmesh.decode.step.tokens", "{token}", "tokens a decode step delivered", buckets.COUNTS
    ),
    "decode_step_duration": histogram(
        "kvmesh.decode.step.duration", "s", "one decode step", buckets.STEP_S
    ),
    "decode_step_sequences": histogram(
        "kvmesh.decode.step.sequences", "{sequence}", "sequences in a step", buckets.COUNTS
    ),
    "decode_step_part_duration": histogram(
        "kvmesh.decode.step.part.duration",
        "s",
        "one part of a decode step",
        buckets.PART_S,
        part=STEP_PARTS,
    ),
    "decode_step_gap": histogram(
        "kvmesh.decode.step.gap", "s", "nothing computed between two decode steps", buckets.PART_S
    ),
    "decode_inter_token": histogram(
        "kvmesh.decode.inter_token.duration",
        "s",
        "between two tokens of the sequences that two consecutive steps share; once a step",
        buckets.PER_TOKEN_S,
    ),
}
"""Histograms that are folded (mesh/folds.py), once a step."""
STEP_COUNTS = {
    "decode_tokens": observed(
        "kvmesh.decode.tokens",
        "{token}",
        "tokens computed: delivered, sampled for a sequence that was cancelled, sampled after a "
        "stop, or computed again after a preemption, a resume or a short pull",
        Kind.OBSERVED_COUNTER,
        disposition=DISPOSITIONS,
    ),
    "decode_padding": observed(
        "kvmesh.decode.step.padding",
        "{slot}",
        "slots of a step that only filled up a CUDA graph's batch",
        Kind.OBSERVED_COUNTER,
    ),
    "decode_graphs": observed(
        "kvmesh.decode.step.graphs",
        "{step}",
        "steps that replayed a CUDA graph (hit) or launched kernels one by one (miss)",
        Kind.OBSERVED_COUNTER,
        result=("hit", "miss"),
    ),
    "decode_preemptions": observed(
        "kvmesh.decode.preemptions",
        "{sequence}",
        "sequences that lost their blocks to others",
        Kind.OBSERVED_COUNTER,
    ),
}
WORKERS = {
    "kv_transfer_duration": histogram(
        "kvmesh.kv.transfer.duration",
        "s",
        "one NIXL transfer; fetch: the store's part of a get that it carried out",
        buckets.TRANSFER_S,
        direction=("get", "put", "fetch"),
    ),
    "kv_transfer_io": counter(
        "kvmesh.kv.transfer.io",
        "By",
        "bytes moved by NIXL; fetch: those of a get that the store carried out",
        direction=("get", "put", "fetch"),
    ),
    "kv_prefix_tokens": counter(
        "kvmesh.kv.prefix.tokens",
        "{token}",
        "prompt tokens whose KV was found or had to be computed",
        result=("hit", "computed"),
    ),
    "kv_prefetches": counter(
        "kvmesh.kv.prefetches",
        "{pull}",
        "prompts pulled before their request was admitted: used by it, pulled in vain, or refused "
        "because the rank had no memory to spare",
        result=("used", "wasted", "refused"),
    ),
}
STORE = {
    "kv_verify_failures": counter(
        "kvmesh.kv.verify.failures",
        "{block}",
        "blocks that were not used",
        reason=VERIFY_REASONS,
    ),
    "kv_tier_blocks": counter(
        "kvmesh.kv.tier.blocks",
        "{block}",
        "blocks copied to a lower tier (demoted), back (promoted), or not (skipped)",
        tier=("dram", "disk"),
        move=("demoted", "promoted", "skipped"),
    ),
    "kv_lookup_blocks": counter(
        "kvmesh.kv.lookup.blocks",
        "{block}",
        "blocks that lookups for reuse asked for: in memory, in a tier below it, or nowhere",
        result=("memory", "below", "miss"),
    ),
}
OBSERVED = {
    "kv_blocks": observed(
        "kvmesh.kv.blocks",
        "{block}",
        "blocks of a store",
        state=("sealed", "reserved", "private", "quarantined", "dropped", "promoting"),
        tier=TIERS,
    ),
    "kv_evictions": observed(
        "kvmesh.kv.evictions",
        "{block}",
        "blocks that left a tier",
        Kind.OBSERVED_COUNTER,
        tier=TIERS,
        cause=("room", "quota"),
    ),
    "kv_leases_expired": observed(
        "kvmesh.kv.lease.expired",
        "{lease}",
        "promises that nobody ended before their deadline",
        Kind.OBSERVED_COUNTER,
        promise=("lease", "reservation", "pin"),
    ),
    "sequences": observed(
        "kvmesh.sequences", "{sequence}", "sequences of a worker", state=("running", "waiting")
    ),
    "peer_state": observed(
        "kvmesh.peer.state",
        "{peer}",
        "peers in the state that a process sees them in",
        role=ROLES,
        state=("ready", "not_ready", "connecting", "up", "down", "leaving"),
    ),
    "telemetry_dropped": observed(
        "kvmesh.telemetry.dropped",
        "{item}",
        "spans and metric exports that were lost",
        Kind.OBSERVED_COUNTER,
        signal=("spans", "metrics"),
    ),
    "gpu_memory": observed(
        "kvmesh.gpu.memory", "By", "memory of the worker's GPU", state=("used", "free")
    ),
    "gpu_utilization": observed(
        "kvmesh.gpu.utilization", "1", "share of time in which the worker's GPU ran kernels"
    ),
}
RECORDED = {**GATEWAY, **WORKERS, **STORE}
OBSERVABLE = {**STEP_COUNTS, **OBSERVED}
ALL = {**RECORDED, **STEPS, **OBSERVABLE}
COUNTED = {
    "gateway": ("requests",),
    "prefill": ("kv_transfer_io", "kv_prefix_tokens", "kv_verify_failures"),
    "decode": ("kv_transfer_io", "kv_verify_failures", "kv_prefetches"),
    "kvstore": ("kv_transfer_io", "kv_verify_failures", "kv_tier_blocks", "kv_lookup_blocks"),
}
"""Counters that a role's processes have from the start, at 0: a rate sees their first event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """All that are neither folded nor observed; real or no-op, by the meter they came from."""

    time_to_first_token: Histogram
    time_per_output_token: Histogram
    request_duration: Histogram
    phase_duration: Histogram
    stream_backpressure: Histogram
    requests: Counter
    requests_rejected: Counter
    retries: Counter
    kv_transfer_duration: Histogram
    kv_transfer_io: Counter
    kv_prefix_tokens: Counter
    kv_prefetches: Counter
    kv_verify_failures: Counter
    kv_tier_blocks: Counter
    kv_lookup_blocks: Counter


def declare(meter: Meter) -> Instruments:
    """Makes every recorded instrument, once per meter."""

    def make(metric: Metric) -> Histogram | Counter:
        if metric.kind is Kind.COUNTER:
            return meter.create_counter(metric.name, metric.unit, metric.description)
        return meter.create_histogram(
            metric.name,
            metric.unit,
            metric.description,
            explicit_bucket_boundaries_advisory=list(metric.buckets),
        )

    made: dict[str, object] = {
        entry.name: make(RECORDED[entry.name]) for entry in fields(Instruments)
    }
    return Instruments(**made)  # pyright: ignore[reportArgumentType] - the table says which is what


def start_at_zero(instruments: Instruments, role: str) -> None:
    """Makes every series of the role's counters, for each value of their closed attributes."""
    for key in COUNTED.get(role, ()):
        attributes = RECORDED[key].attributes
        for values in itertools.product(*attributes.values()):
            getattr(instruments, key).add(0, dict(zip(attributes, values, strict=True)))
