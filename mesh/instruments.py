"""Every metric of kvmesh, declared once: name, unit, buckets.

Names follow OpenTelemetry's GenAI conventions where they exist, else `kvmesh.*`. Recorded per step
or per request, never per token; request ids are never attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

from opentelemetry.metrics import Counter, Histogram, Meter

# GenAI conventions' boundaries, widened where a batch of one or an overloaded mesh leaves them.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
PER_TOKEN_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
REQUEST_S = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    163.84, 327.68, 655.36,
)  # fmt: skip
STEP_S = (
    0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06,
    0.08, 0.12, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12,
)  # fmt: skip
PART_S = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip
TRANSFER_S = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
COUNTS = tuple(float(2**power) for power in range(14))  # 1 to 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """All instruments but the observed ones; real or no-op objects, by the meter they came from."""

    time_to_first_token: Histogram
    time_per_output_token: Histogram
    request_duration: Histogram
    decode_step_tokens: Histogram
    decode_step_duration: Histogram
    decode_step_sequences: Histogram
    decode_step_part_duration: Histogram
    decode_step_gap: Histogram
    decode_tokens: Counter
    kv_transfer_duration: Histogram
    kv_transfer_io: Counter
    kv_prefix_tokens: Counter
    kv_verify_failures: Counter
    kv_tier_blocks: Counter
    requests: Counter
    requests_rejected: Counter
    retries: Counter


def declare(meter: Meter) -> Instruments:
    """Makes every instrument, once per meter; attributes in braces are the callers' to give."""

    def histogram(name: str, unit: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return meter.create_histogram(
            name, unit, help_text, explicit_bucket_boundaries_advisory=list(buckets)
        )

    counter = meter.create_counter
    return Instruments(
        time_to_first_token=histogram(
            "gen_ai.server.time_to_first_token", "s", "arrival to first token", FIRST_TOKEN_S
        ),
        time_per_output_token=histogram(
            "gen_ai.server.time_per_output_token", "s", "mean after the first", PER_TOKEN_S
        ),
        request_duration=histogram(
            "gen_ai.server.request.duration", "s", "arrival to the last message", REQUEST_S
        ),
        decode_step_tokens=histogram(
            "kvmesh.decode.step.tokens", "{token}", "tokens scheduled in a decode step", COUNTS
        ),
        decode_step_duration=histogram(
            "kvmesh.decode.step.duration", "s", "one decode step", STEP_S
        ),
        decode_step_sequences=histogram(
            "kvmesh.decode.step.sequences", "{sequence}", "sequences in a decode step", COUNTS
        ),
        decode_step_part_duration=histogram(
            "kvmesh.decode.step.part.duration",
            "s",
            "one {part} of a decode step: schedule, forward, sample or emit",
            PART_S,
        ),
        decode_step_gap=histogram(
            "kvmesh.decode.step.gap", "s", "nothing computed between two decode steps", PART_S
        ),
        decode_tokens=counter("kvmesh.decode.tokens", "{token}", "generated {disposition}"),
        kv_transfer_duration=histogram(
            "kvmesh.kv.transfer.duration", "s", "one NIXL transfer", TRANSFER_S
        ),
        kv_transfer_io=counter("kvmesh.kv.transfer.io", "By", "bytes moved by NIXL"),
        kv_prefix_tokens=counter("kvmesh.kv.prefix.tokens", "{token}", "prompt tokens {result}"),
        kv_verify_failures=counter(
            "kvmesh.kv.verify.failures", "{block}", "blocks not used {reason}"
        ),
        kv_tier_blocks=counter(
            "kvmesh.kv.tier.blocks", "{block}", "copied to or from {tier} {move}, or not: skipped"
        ),
        requests=counter("kvmesh.requests", "{request}", "requests by {state}"),
        requests_rejected=counter("kvmesh.requests.rejected", "{request}", "refused {reason}"),
        retries=counter("kvmesh.retries", "{retry}", "second tries {phase,reason}"),
    )
