"""Times and counts of one request.

Owns what its usage message and its metrics say; never decides anything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mesh.telemetry import Instruments
from protos import gateway_pb2


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Filled in as the request goes; `_at` is on the monotonic clock, `_s` a length in seconds."""

    arrived_at: float = field(default_factory=time.monotonic)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    put_s: float = 0.0
    get_s: float = 0.0
    first_token_at: float | None = None
    last_token_at: float | None = None

    def on_started(self, num_cached_tokens: int) -> None:
        """A prefill instance begins to compute now."""
        self.num_cached_tokens = num_cached_tokens
        self.queue_s = time.monotonic() - self.arrived_at

    def on_token(self) -> None:
        """Tokens came in now."""
        self.last_token_at = time.monotonic()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at

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
        num_steps = max(output_lens, default=0) - 1
        if num_steps > 0:
            instruments.time_per_output_token.record(
                (self.last_token_at - self.first_token_at) / num_steps
            )
