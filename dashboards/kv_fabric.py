"""The board KV fabric: where prompts' blocks were found, how they moved, what kept them back."""

from __future__ import annotations

from dashboards import promql
from dashboards.board import Board, Look, Row
from dashboards.panels import number, panel, query
from dashboards.promql import entries, growth, level, quantile, rate, share, volume

FOUND = promql.ratio(rate("kv_lookup_blocks", result=("memory", "below")), rate("kv_lookup_blocks"))
REUSED = promql.ratio(rate("kv_prefix_tokens", result="hit"), rate("kv_prefix_tokens"))
PLACES = ("sealed", "reserved", "private", "promoting", "quarantined", "dropped")


NOW = Row(
    title="Now",
    panels=(
        number("Blocks found", "Share of the blocks that lookups asked for.", FOUND),
        number("Prompt tokens reused", "Share whose KV was not computed again.", REUSED),
        number(
            "Blocks",
            "Sealed ones in the stores' memory.",
            level("kv_blocks", state="sealed", tier="memory"),
        ),
        number("Moved", "Bytes that NIXL moved, both ways.", rate("kv_transfer_io")),
        number("Evicted", "Blocks that left a tier.", rate("kv_evictions")),
        number(
            "Blocks not used",
            "That a puller or a store refused since the processes started; each was computed anew.",
            level("kv_verify_failures"),
        ),
    ),
)
REUSE = Row(
    title="Reuse",
    panels=(
        panel(
            "Hit rate by tier",
            "Where lookups found the blocks they asked for; a miss is computed.",
            Look.SHARES,
            query(share("kv_lookup_blocks", by="result"), "{{result}}"),
            width=6,
        ),
        panel(
            "Blocks looked up",
            "By where they were.",
            Look.STACKED,
            query(rate("kv_lookup_blocks", by="result"), "{{result}}"),
            width=6,
        ),
        panel(
            "Prompt tokens",
            "Whose KV was found, or had to be computed.",
            Look.STACKED,
            query(rate("kv_prefix_tokens", by="result"), "{{result}}"),
            width=6,
        ),
        panel(
            "Prompts pulled ahead",
            "While prefill computes the last chunk: used, in vain, or refused for want of memory.",
            Look.STACKED,
            query(rate("kv_prefetches", by="result"), "{{result}}"),
            width=6,
        ),
    ),
)
BLOCKS = Row(
    title="Blocks",
    panels=(
        panel(
            "Slots of the stores' memory",
            "Reserved: being written. Private: a prompt's tail. Promoting: coming back from a "
            "lower tier. Quarantined: waiting for a late writer. Dropped: read out, then free.",
            Look.STACKED,
            query(level("kv_blocks", by="state", state=PLACES, tier="memory"), "{{state}}"),
            width=16,
        ),
        panel(
            "Sealed blocks by tier",
            "A block may be in several tiers.",
            Look.LINES,
            query(level("kv_blocks", by="tier", state="sealed"), "{{tier}}"),
        ),
        panel(
            "Evictions",
            "By tier and cause. Many of them for want of room: the prompts need a larger store.",
            Look.LINES,
            query(rate("kv_evictions", by="tier, cause"), "{{tier}} {{cause}}"),
        ),
        panel(
            "Moves between tiers",
            "Copies to a lower tier (demoted), back (promoted), or none (skipped).",
            Look.LINES,
            query(rate("kv_tier_blocks", by="tier, move"), "{{tier}} {{move}}"),
        ),
        panel(
            "Promises that nobody ended",
            "Leases, reservations and pins whose deadline came first: an owner died or hung.",
            Look.LINES,
            query(growth("kv_leases_expired", by="promise"), "{{promise}}"),
        ),
    ),
)
TRANSFERS = Row(
    title="Transfers",
    panels=(
        panel(
            "Bytes moved",
            "Put: from a worker into a store. Get: back into a worker.",
            Look.STACKED,
            query(rate("kv_transfer_io", by="direction"), "{{direction}}"),
        ),
        panel(
            "One transfer",
            "One NIXL transfer of many blocks, from posting to completion.",
            Look.LINES,
            *(
                query(quantile(q, "kv_transfer_duration", direction=way), f"{way} p{q * 100:g}")
                for way in ("get", "put")
                for q in (0.5, 0.95)
            ),
        ),
        panel(
            "Bytes a second of transferring",
            "What one transfer reaches while it runs.",
            Look.LINES,
            query(
                promql.ratio(
                    rate("kv_transfer_io", by="direction"),
                    volume("kv_transfer_duration", by="direction"),
                    "Bps",
                ),
                "{{direction}}",
            ),
        ),
        panel(
            "Blocks not used, by reason",
            "Digest or identity: bytes were not what they should be. Others: they came too late.",
            Look.LINES,
            query(growth("kv_verify_failures", by="reason"), "{{reason}}"),
        ),
        panel(
            "Blocks not used so far",
            "Since the processes started.",
            Look.BARS,
            query(level("kv_verify_failures", by="reason"), "{{reason}}"),
        ),
        panel(
            "Transfers",
            "A second, by direction.",
            Look.LINES,
            query(entries("kv_transfer_duration", "{transfer}", by="direction"), "{{direction}}"),
        ),
    ),
)
RANKS = Row(
    title="Instances",
    panels=(
        panel(
            "Rank by rank",
            "Every process of the mesh, now.",
            Look.TABLE,
            query(promql.SERVICES, "Role"),
            query(rate("decode_tokens", by="instance", disposition="delivered"), "Delivered"),
            query(level("sequences", by="instance", state="running"), "Running"),
            query(level("sequences", by="instance", state="waiting"), "Waiting"),
            query(quantile(0.95, "decode_inter_token", by="instance"), "Between tokens, p95"),
            query(rate("kv_transfer_io", by="instance", direction="get"), "Get"),
            query(rate("kv_transfer_io", by="instance", direction="put"), "Put"),
            query(
                quantile(0.95, "kv_transfer_duration", by="instance", direction="get"),
                "One get, p95",
            ),
            query(level("kv_blocks", by="instance", state="sealed"), "Sealed blocks"),
            query(level("kv_verify_failures", by="instance"), "Blocks not used"),
            width=24,
        ),
    ),
)
BOARD = Board(
    uid="kv-fabric",
    title="kvmesh: KV fabric",
    text="Where blocks are, how they move, and what was reused.",
    rows=(NOW, REUSE, BLOCKS, TRANSFERS, RANKS),
)
