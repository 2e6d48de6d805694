"""The board Decode steps: what every step of the ranks delivered, and where its time went."""

from __future__ import annotations

from dashboards import promql
from dashboards.board import Board, Look, Query, Row
from dashboards.panels import number, panel, quantiles, query
from dashboards.promql import Expression, buckets, entries, growth, level, quantile, rate, volume

DELIVERED = rate("decode_tokens", disposition="delivered")
STEPS = entries("decode_step_duration", "{step}")
GAP = volume("decode_step_gap")
GAP_SHARE = promql.ratio(GAP, promql.together(GAP, volume("decode_step_duration")))
WASTED_SHARE = promql.rest(DELIVERED, rate("decode_tokens"))
GRAPH_HITS = promql.ratio(rate("decode_graphs", result="hit"), rate("decode_graphs"))
PADDING = rate("decode_padding")
PADDING_SHARE = promql.ratio(PADDING, promql.together(PADDING, volume("decode_step_sequences")))


def _per_step(part: Expression, legend: str) -> Query:
    """Seconds of one part in the mean step."""
    return query(promql.ratio(part, STEPS, promql.SECONDS), legend)


NOW = Row(
    title="Now",
    panels=(
        number("Delivered", "Tokens that reached a sequence, a second.", DELIVERED),
        number("Steps", "Decode steps a second, over all ranks.", STEPS),
        number(
            "Between tokens, p95",
            "Of the sequences that two consecutive steps share.",
            quantile(0.95, "decode_inter_token"),
        ),
        number("Gap", "Share of a busy rank's time in which nothing was computed.", GAP_SHARE),
        number(
            "Wasted tokens",
            "Computed but not delivered: cancelled, sampled after a stop, computed again.",
            WASTED_SHARE,
        ),
        number(
            "Sequences",
            "Running ones are in the batch; waiting ones want blocks or a place in it.",
            level("sequences", by="state"),
            "{{state}}",
        ),
    ),
)
TOKENS = Row(
    title="Tokens",
    panels=(
        panel(
            "Delivered tokens by rank",
            "Tokens that reached a sequence.",
            Look.STACKED,
            query(rate("decode_tokens", by="instance", disposition="delivered"), "{{instance}}"),
            width=12,
        ),
        panel(
            "Steps by rank",
            "A rank that does fewer steps than the others has longer ones, or none to do.",
            Look.LINES,
            query(entries("decode_step_duration", "{step}", by="instance"), "{{instance}}"),
            width=12,
        ),
        panel(
            "Tokens per step",
            "More tokens a step is a better use of the weights that each step reads.",
            Look.LINES,
            query(quantile(0.5, "decode_step_tokens"), "p50"),
            query(quantile(0.95, "decode_step_tokens"), "p95"),
            query(promql.mean("decode_step_tokens"), "mean"),
            width=12,
        ),
        panel(
            "Tokens per step, all of them",
            "How many steps delivered how many tokens.",
            Look.HEATMAP,
            query(buckets("decode_step_tokens"), "{{le}}"),
            width=12,
        ),
    ),
)
TIME = Row(
    title="Time",
    panels=(
        panel(
            "Where a step's time goes",
            "The mean step: computing (forward, sample) and the gap before it. They add up to the "
            "time from one step's end to the next one's.",
            Look.STACKED,
            _per_step(volume("decode_step_part_duration", part="forward"), "forward"),
            _per_step(volume("decode_step_part_duration", part="sample"), "sample"),
            _per_step(GAP, "gap"),
        ),
        panel(
            "Work beside the computing",
            "Scheduling a step and handing on the tokens of the one before. Where the next step is "
            "computed meanwhile it costs nothing, else it is part of the gap.",
            Look.STACKED,
            _per_step(volume("decode_step_part_duration", part="schedule"), "schedule"),
            _per_step(volume("decode_step_part_duration", part="emit"), "emit"),
        ),
        panel(
            "Share of the gap",
            "Time without computing between two steps, of the time that the rank was busy.",
            Look.LINES,
            query(GAP_SHARE, "gap"),
        ),
        panel(
            "Step duration",
            "Computing alone, without the gap.",
            Look.LINES,
            *quantiles("decode_step_duration"),
        ),
        panel(
            "Between two tokens",
            "What a client sees as the pace of the text.",
            Look.LINES,
            *quantiles("decode_inter_token"),
        ),
        panel(
            "Between two tokens, all of them",
            "A second band above the first one: steps that prompts or preemptions stretch.",
            Look.HEATMAP,
            query(buckets("decode_inter_token"), "{{le}}"),
        ),
    ),
)
BATCH = Row(
    title="Batch and waste",
    panels=(
        panel(
            "Sequences",
            "Waiting ones for long: more ranks, or more memory for blocks.",
            Look.STACKED,
            query(level("sequences", by="state"), "{{state}}"),
            width=6,
        ),
        panel(
            "Preempted",
            "Sequences that lost their blocks to others and are computed again.",
            Look.LINES,
            query(growth("decode_preemptions", by="instance"), "{{instance}}"),
            width=6,
        ),
        panel(
            "Wasted tokens",
            "Share of the computed tokens that reached no sequence.",
            Look.LINES,
            query(WASTED_SHARE, "wasted"),
            width=6,
        ),
        panel(
            "Tokens by what became of them",
            "Cancelled by the client, discarded after a stop, or computed again.",
            Look.SHARES,
            query(promql.share("decode_tokens", by="disposition"), "{{disposition}}"),
            width=6,
        ),
    ),
)
GPU = Row(
    title="GPU",
    panels=(
        panel(
            "CUDA graphs",
            "Share of the steps that replayed a graph; the others launched kernel by kernel.",
            Look.LINES,
            query(GRAPH_HITS, "hits", needs_gpu=True),
            width=6,
        ),
        panel(
            "Padding",
            "Share of the steps' rows that no sequence filled.",
            Look.LINES,
            query(PADDING_SHARE, "padding", needs_gpu=True),
            width=6,
        ),
        panel(
            "GPU use",
            "Share of time in which a worker's GPU ran kernels.",
            Look.LINES,
            query(level("gpu_utilization", by="instance"), "{{instance}}", needs_gpu=True),
            width=6,
        ),
        panel(
            "GPU memory",
            "Of the workers' GPUs.",
            Look.STACKED,
            query(level("gpu_memory", by="state"), "{{state}}", needs_gpu=True),
            width=6,
        ),
    ),
)
BOARD = Board(
    uid="decode-steps",
    title="kvmesh: decode steps",
    text="Every token and every millisecond of a decode step.",
    rows=(NOW, TOKENS, TIME, BATCH, GPU),
)
