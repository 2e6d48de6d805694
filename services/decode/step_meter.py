"""What a rank's steps did: metrics, and the same numbers for StatusService.

Owns the sums since the start. Called once per step; never per token.
"""

from __future__ import annotations

import bisect
import time

from engine.engine import Engine
from engine.sequence import StepOutcome
from mesh import buckets
from mesh.instruments import STEP_PARTS, Instruments
from protos import status_pb2

_PARTS = {part: {"part": part} for part in STEP_PARTS}
_RESULTS = {True: {"result": "hit"}, False: {"result": "miss"}}


class StepMeter:
    """Takes outcomes; `snapshot` tells what they add up to."""

    def __init__(self, engine: Engine, instruments: Instruments) -> None:
        self._engine = engine
        self._instruments = instruments
        self._sums = status_pb2.DecodeSteps(
            steps_by_tokens=[0] * (len(buckets.COUNTS) + 1),
            steps_by_duration=[0] * (len(buckets.STEP_S) + 1),
            steps_by_inter_token=[0] * (len(buckets.PER_TOKEN_S) + 1),
        )
        self._last_sequences: set[int] = set()
        self._last_token_at = 0.0

    def record(self, outcome: StepOutcome) -> int:
        """Books one step; returns the tokens it delivered."""
        sums = self._sums
        num_tokens = sum(len(item.token_ids) for item in outcome.items)
        num_computed = sum(i.num_computed_after - i.num_computed_before for i in outcome.items)
        num_recomputed = num_computed - num_tokens
        sums.num_steps += 1
        sums.schedule_s += outcome.schedule_s
        sums.forward_s += outcome.forward_s
        sums.sample_s += outcome.sample_s
        sums.emit_s += outcome.emit_s
        sums.gap_s += outcome.gap_s
        sums.steps_by_tokens[bisect.bisect_left(buckets.COUNTS, num_tokens)] += 1
        sums.steps_by_duration[bisect.bisect_left(buckets.STEP_S, outcome.duration_s)] += 1
        self._record_times(outcome, num_tokens)
        self._count_tokens(
            delivered=num_tokens,
            cancelled=outcome.num_cancelled,
            discarded=outcome.num_discarded,
            recomputed=num_recomputed,
        )
        self._count_graph(outcome)
        self._count_preemptions()
        self._record_inter_token(outcome)
        return num_tokens

    def snapshot(self) -> status_pb2.DecodeSteps:
        """The sums, and how many sequences run and wait now."""
        self._sums.num_running = self._engine.num_running
        self._sums.num_waiting = self._engine.num_waiting
        return self._sums

    def _record_times(self, outcome: StepOutcome, num_tokens: int) -> None:
        instruments = self._instruments
        instruments.decode_step_tokens.record(num_tokens)
        instruments.decode_step_sequences.record(len(outcome.items))
        instruments.decode_step_duration.record(outcome.duration_s)
        instruments.decode_step_gap.record(outcome.gap_s)
        part_duration = instruments.decode_step_part_duration
        part_duration.record(outcome.schedule_s, _PARTS["schedule"])
        part_duration.record(outcome.forward_s, _PARTS["forward"])
        part_duration.record(outcome.sample_s, _PARTS["sample"])
        part_duration.record(outcome.emit_s, _PARTS["emit"])

    def _count_tokens(
        self, *, delivered: int, cancelled: int, discarded: int, recomputed: int
    ) -> None:
        sums, counter = self._sums, self._instruments.decode_tokens
        sums.num_delivered += delivered
        sums.num_cancelled += cancelled
        sums.num_discarded += discarded
        sums.num_recomputed += recomputed
        counter.add(delivered, {"disposition": "delivered"})
        if cancelled:
            counter.add(cancelled, {"disposition": "cancelled"})
        if discarded:
            counter.add(discarded, {"disposition": "discarded"})
        if recomputed:
            counter.add(recomputed, {"disposition": "recomputed"})

    def _count_graph(self, outcome: StepOutcome) -> None:
        if outcome.graph_rows is None:
            return
        is_hit = outcome.graph_rows > 0
        self._instruments.decode_graphs.add(1, _RESULTS[is_hit])
        if not is_hit:
            self._sums.num_graph_misses += 1
            return
        num_rows = len(outcome.items) + outcome.num_cancelled + outcome.num_discarded
        num_padding = outcome.graph_rows - num_rows
        self._sums.num_graph_hits += 1
        self._sums.num_padding += num_padding
        self._instruments.decode_padding.add(num_padding)

    def _count_preemptions(self) -> None:
        num_new = self._engine.num_preemptions - self._sums.num_preemptions
        if num_new:
            self._sums.num_preemptions += num_new
            self._instruments.decode_preemptions.add(num_new)

    def _record_inter_token(self, outcome: StepOutcome) -> None:
        """Time since the last step's tokens, if a sequence got one from both."""
        now = time.perf_counter()
        sequences = {id(item.sequence) for item in outcome.items if item.token_ids}
        if not sequences.isdisjoint(self._last_sequences):
            duration_s = now - self._last_token_at
            place = bisect.bisect_left(buckets.PER_TOKEN_S, duration_s)
            self._sums.steps_by_inter_token[place] += 1
            self._instruments.decode_inter_token.record(duration_s)
        if sequences:
            self._last_sequences, self._last_token_at = sequences, now
