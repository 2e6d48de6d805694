"""What a rank's steps did: metrics, and the same numbers for StatusService.

Owns the sums since the start, which both are made from. Called once per step; never per token.
"""

from __future__ import annotations

import time

from engine.engine import Engine
from engine.sequence import StepOutcome
from mesh.instruments import STEP_PARTS
from mesh.telemetry import Observed, Telemetry
from protos import status_pb2


class StepMeter:
    """Takes outcomes; `snapshot` and the metrics tell what they add up to."""

    def __init__(self, engine: Engine, telemetry: Telemetry) -> None:
        self._engine = engine
        self._sums = status_pb2.DecodeSteps()
        series = telemetry.folds.series
        self._tokens = series("decode_step_tokens")
        self._sequences = series("decode_step_sequences")
        self._duration = series("decode_step_duration")
        self._gap = series("decode_step_gap")
        self._inter_token = series("decode_inter_token")
        parts = {part: series("decode_step_part_duration", part=part) for part in STEP_PARTS}
        self._schedule, self._forward = parts["schedule"], parts["forward"]
        self._sample, self._emit = parts["sample"], parts["emit"]
        self._last_sequences: set[int] = set()
        self._last_token_at = 0.0
        self._observe(telemetry)

    def record(self, outcome: StepOutcome) -> int:
        """Books one step; returns the tokens it delivered."""
        num_tokens = sum(len(item.token_ids) for item in outcome.items)
        num_computed = sum(i.num_computed_after - i.num_computed_before for i in outcome.items)
        self._tokens.record(num_tokens)
        self._sequences.record(len(outcome.items))
        self._duration.record(outcome.duration_s)
        self._gap.record(outcome.gap_s)
        self._schedule.record(outcome.schedule_s)
        self._forward.record(outcome.forward_s)
        self._sample.record(outcome.sample_s)
        self._emit.record(outcome.emit_s)
        sums = self._sums
        sums.num_steps += 1
        sums.num_delivered += num_tokens
        sums.num_cancelled += outcome.num_cancelled
        sums.num_discarded += outcome.num_discarded
        sums.num_recomputed += num_computed - num_tokens
        sums.num_preemptions = self._engine.num_preemptions
        self._count_graph(outcome)
        self._record_inter_token(outcome)
        return num_tokens

    def snapshot(self) -> status_pb2.DecodeSteps:
        """The sums, and how many sequences run and wait now."""
        sums = self._sums
        sums.schedule_s, sums.forward_s = self._schedule.sum, self._forward.sum
        sums.sample_s, sums.emit_s = self._sample.sum, self._emit.sum
        sums.gap_s = self._gap.sum
        sums.steps_by_tokens[:] = self._tokens.counts
        sums.steps_by_duration[:] = self._duration.counts
        sums.steps_by_inter_token[:] = self._inter_token.counts
        sums.num_running = self._engine.num_running
        sums.num_waiting = self._engine.num_waiting
        return sums

    def _observe(self, telemetry: Telemetry) -> None:
        sums = self._sums

        def tokens() -> Observed:
            return [
                (sums.num_delivered, {"disposition": "delivered"}),
                (sums.num_cancelled, {"disposition": "cancelled"}),
                (sums.num_discarded, {"disposition": "discarded"}),
                (sums.num_recomputed, {"disposition": "recomputed"}),
            ]

        def graphs() -> Observed:
            return [
                (sums.num_graph_hits, {"result": "hit"}),
                (sums.num_graph_misses, {"result": "miss"}),
            ]

        telemetry.observe("decode_tokens", tokens)
        telemetry.observe("decode_graphs", graphs)
        telemetry.observe("decode_padding", lambda: [(sums.num_padding, {})])
        telemetry.observe("decode_preemptions", lambda: [(sums.num_preemptions, {})])

    def _count_graph(self, outcome: StepOutcome) -> None:
        if outcome.graph_rows is None:
            return
        if not outcome.graph_rows:
            self._sums.num_graph_misses += 1
            return
        num_rows = len(outcome.items) + outcome.num_cancelled + outcome.num_discarded
        self._sums.num_graph_hits += 1
        self._sums.num_padding += outcome.graph_rows - num_rows

    def _record_inter_token(self, outcome: StepOutcome) -> None:
        """Time since the last step's tokens, if a sequence got one from both."""
        now = time.perf_counter()
        sequences = {id(item.sequence) for item in outcome.items if item.token_ids}
        if not sequences.isdisjoint(self._last_sequences):
            self._inter_token.record(now - self._last_token_at)
        if sequences:
            self._last_sequences, self._last_token_at = sequences, now
