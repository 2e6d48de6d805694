"""Times and counts of one request.

Owns what its usage message and its metrics say; never decides anything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mesh.telemetry import Instruments
from protos import gateway_pb2, prefill_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a request, for its metric and its span; began_at is on the monotonic clock."""

    stage: str
    name: str
    began_at: float
    duration_s: float


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Filled in as the request goes; `_at` is on the monotonic clock, `_s` a length in seconds."""

    arrived_at: float = field(default_factory=time.monotonic)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    called_at: float = 0.0  # prefill, the last time
    queue_s: float = 0.0  # until prefill begins to compute, its pull included
    instance_queue_s: float = 0.0  # of those, since arrival at the instance
    prefill_s: float = 0.0
    put_s: float = 0.0
    get_s: float = 0.0
    pull_s: dict[str, float] = field(default_factory=dict)  # of prefill, by phase
    admitted_at: float | None = None
    second_token_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    def on_call(self) -> None:
        """A prefill instance is called now."""
        self.called_at = time.monotonic()

    def on_started(self, started: prefill_pb2.PrefillStarted) -> None:
        """A prefill instance begins to compute now."""
        self.num_cached_tokens = started.num_cached_tokens
        self.queue_s = time.monotonic() - self.arrived_at
        self.instance_queue_s = started.queue_s
        self.pull_s = {
            "lookup": started.lookup_s,
            "get": started.get_s,
            "verify": started.verify_s,
        }

    def on_admitted(self, get_s: float) -> None:
        """A decode rank has the KV now; it was get_s seconds about it."""
        self.get_s += get_s
        self.admitted_at = self.admitted_at or time.monotonic()

    def on_token(self) -> None:
        """Tokens came in now."""
        self.last_token_at = time.monotonic()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at
        elif self.second_token_at is None:
            self.second_token_at = self.last_token_at

    def usage(self, output_lens: list[int]) -> gateway_pb2.Usage:
        """The usage message; `output_lens` are the tokens of each sequence.

        A step gives each of its sequences one token and prefill gave the first, so the longest
        sequence tells the number of decode steps.
        """
        first, last = self.first_token_at, self.last_token_at
        return gateway_pb2.Usage(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=sum(output_lens),
            queue_s=self.queue_s,
            prefill_s=self.prefill_s,
            put_s=self.put_s,
            get_s=self.get_s,
            first_token_s=0.0 if first is None else first - self.arrived_at,
            decode_s=0.0 if first is None or last is None else last - first,
            num_steps=max(0, max(output_lens, default=0) - 1),
        )

    def record(self, instruments: Instruments, state: str, output_lens: list[int]) -> None:
        """Adds the request to the metrics; `state` is how it ended."""
        instruments.requests.add(1, {"state": state})
        instruments.request_duration.record(time.monotonic() - self.arrived_at, {"state": state})
        if self.first_token_at is None or self.last_token_at is None:
            return
        instruments.time_to_first_token.record(self.first_token_at - self.arrived_at)
        for phase in self.phases():
            attributes = {"stage": phase.stage, "phase": phase.name}
            instruments.phase_duration.record(phase.duration_s, attributes)
        num_steps = max(output_lens, default=0) - 1
        if num_steps > 0:
            instruments.time_per_output_token.record(
                (self.last_token_at - self.first_token_at) / num_steps
            )

    def phases(self) -> list[Phase]:
        """All that are over, in order. Each is measured where it happens, in one process; wire is
        what the gateway waited for prefill beyond the time that prefill counted itself.
        """
        if self.first_token_at is None:
            return []
        pull_s = sum(self.pull_s.values())
        counted_s = self.instance_queue_s + self.prefill_s + self.put_s
        durations_s = {
            "queue": self.called_at - self.arrived_at + self.instance_queue_s - pull_s,
            **self.pull_s,
            "prefill": self.prefill_s,
            "put": self.put_s,
            "wire": max(0.0, self.first_token_at - self.called_at - counted_s),
        }
        phases = _in_order("first_token", self.arrived_at, durations_s)
        if self.admitted_at is not None and self.second_token_at is not None:
            first_at, second_at = self.first_token_at, self.second_token_at
            admitted_at = min(max(first_at, self.admitted_at), second_at)
            steps_s = {"handover": admitted_at - first_at, "first_step": second_at - admitted_at}
            phases += _in_order("second_token", first_at, steps_s)
        return phases


def _in_order(stage: str, began_at: float, durations_s: dict[str, float]) -> list[Phase]:
    """Phases that follow each other."""
    phases = []
    for name, duration_s in durations_s.items():
        phases.append(Phase(stage=stage, name=name, began_at=began_at, duration_s=duration_s))
        began_at += duration_s
    return phases
