"""The board Overview: what clients of the mesh see, and which part of the mesh they wait for."""

from __future__ import annotations

from dashboards import promql
from dashboards.board import Board, Choice, Look, Query, Row
from dashboards.panels import number, panel, quantiles, query
from dashboards.promql import growth, level, quantile, rate, share, shared_out, within
from mesh import buckets
from mesh.instruments import TO_FIRST_TOKEN, TO_SECOND_TOKEN

FIRST, EACH = "time_to_first_token", "time_per_output_token"
FIRST_CHOICE, EACH_CHOICE = "first_token_slo", "per_token_slo"
ENDED = rate("requests")
WELL = ("completed", "aborted", "cancelled", "rejected")
FAILED = promql.rest(rate("requests", state=WELL), ENDED)


def _phases(stage: str, phases: tuple[str, ...]) -> tuple[Query, ...]:
    """A query a phase, in the order in which a request goes through them."""
    return tuple(
        query(shared_out("phase_duration", "phase", phase, stage=stage), phase) for phase in phases
    )


def _choice(name: str, label: str, bounds: tuple[float, ...], default: float) -> Choice:
    options = {bound: (f"{bound:g} s", promql.boundary(bound)) for bound in bounds}
    return Choice(name=name, label=label, options=tuple(options.values()), default=options[default])


NOW = Row(
    title="Now",
    panels=(
        number("Requests", "That ended, a second.", ENDED),
        number("Time to first token, p95", "From arrival.", quantile(0.95, FIRST)),
        number("Time per token after it, p95", "A request's mean.", quantile(0.95, EACH)),
        number(
            "First tokens in time",
            "Share of the requests whose first token came within the chosen limit.",
            within(FIRST, FIRST_CHOICE),
        ),
        number("Errors", "Share of the requests that the mesh failed.", FAILED),
        number(
            "Ready",
            "Instances that the gateway gives work to; a store is one that answers it.",
            level("peer_state", by="role", state="ready"),
            "{{role}}",
        ),
    ),
)
FIRST_TOKEN = Row(
    title="To the first token",
    panels=(
        panel(
            "Where the time to the first token goes",
            "The mean request, phase after phase, now.",
            Look.BARS,
            *_phases("first_token", TO_FIRST_TOKEN),
        ),
        panel(
            "The same over time",
            "The phases add up to the mean time to first token.",
            Look.STACKED,
            *_phases("first_token", TO_FIRST_TOKEN),
        ),
        panel(
            "From the first token to the second",
            "The hand-over: the rank finds, pulls and verifies the blocks, then decodes.",
            Look.STACKED,
            *_phases("second_token", TO_SECOND_TOKEN),
        ),
        panel("Time to first token", "From arrival at the gateway.", Look.LINES, *quantiles(FIRST)),
        panel(
            "Time to first token, all of them",
            "Warm prompts make one band, cold ones another.",
            Look.HEATMAP,
            query(promql.buckets(FIRST), "{{le}}"),
        ),
        panel(
            "Time per output token",
            "A request's mean after its first.",
            Look.LINES,
            *quantiles(EACH),
        ),
    ),
)
SLO = Row(
    title="Service level",
    panels=(
        panel(
            "In time",
            "Share of the requests within the limits chosen above.",
            Look.LINES,
            query(within(FIRST, FIRST_CHOICE), "first token"),
            query(within(EACH, EACH_CHOICE), "each token after it"),
            width=12,
        ),
        panel(
            "Request duration",
            "Arrival to the last message.",
            Look.LINES,
            *quantiles("request_duration"),
            width=12,
        ),
    ),
)
RATES = Row(
    title="Rates and errors",
    panels=(
        panel(
            "Requests by how they ended",
            "Aborted by a call of Abort, cancelled by the client's leaving.",
            Look.STACKED,
            query(rate("requests", by="state"), "{{state}}"),
        ),
        panel(
            "Shares of the ends",
            "Of the requests that ended.",
            Look.SHARES,
            query(share("requests", by="state"), "{{state}}"),
        ),
        panel(
            "Prompt and output tokens",
            "Prompt tokens whose KV was found or computed; output tokens delivered.",
            Look.LINES,
            query(rate("kv_prefix_tokens", by="result"), "prompt, {{result}}"),
            query(rate("decode_tokens", disposition="delivered"), "output"),
        ),
        panel(
            "Rejections",
            "By the reason that the client was told.",
            Look.LINES,
            query(growth("requests_rejected", by="reason"), "{{reason}}"),
        ),
        panel(
            "Retries",
            "Second tries elsewhere; the client sees none of them.",
            Look.LINES,
            query(growth("retries", by="phase, reason"), "{{phase}} {{reason}}"),
        ),
        panel(
            "Backpressure",
            "How long clients' streams took nothing while something was there for them.",
            Look.LINES,
            *quantiles("stream_backpressure"),
        ),
    ),
)
MESH = Row(
    title="The mesh",
    panels=(
        panel(
            "Peers by state",
            "The gateway sees ready or not; workers see how their connections to stores are.",
            Look.STACKED,
            query(level("peer_state", by="role, state"), "{{role}} {{state}}"),
            width=12,
        ),
        panel(
            "Lost telemetry",
            "Spans and metric exports that no collector took.",
            Look.LINES,
            query(growth("telemetry_dropped", by="signal"), "{{signal}}"),
            width=12,
        ),
    ),
)
BOARD = Board(
    uid="overview",
    title="kvmesh: overview",
    text="What clients see, and what they wait for.",
    rows=(NOW, FIRST_TOKEN, SLO, RATES, MESH),
    choices=(
        _choice(FIRST_CHOICE, "First token within", buckets.FIRST_TOKEN_S, 1.0),
        _choice(EACH_CHOICE, "Each token within", buckets.PER_TOKEN_S, 0.05),
    ),
)
