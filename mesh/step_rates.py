"""What a mesh did between two looks at its status: rates, percentiles and shares.

Owns the arithmetic of the gateway's live page and of `kvmesh top`. Never asks a process, never
draws. Statuses hold sums since each process's start, so a rate is the difference of two of them
over the process's own clock: when the status was fetched does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh import buckets
from protos import status_pb2

PARTS = ("forward", "sample", "schedule", "emit", "gap")
WASTED = ("cancelled", "discarded", "recomputed")
_GAUGES = ("num_running", "num_waiting")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRates:
    """Decode steps over an interval, of one rank or of all. None where no step tells anything.

    Percentiles come from histograms. parts_s: mean seconds of each part of a step. gap_share: of
    the parts' sum. wasted_shares: of all tokens computed, by what became of them.
    """

    tokens_per_s: float
    steps_per_s: float
    step_tokens_p50: float | None
    step_tokens_p95: float | None
    inter_token_p50_s: float | None
    inter_token_p95_s: float | None
    parts_s: dict[str, float] | None
    gap_share: float | None
    wasted_shares: dict[str, float] | None
    wasted_share: float | None
    preemptions_per_s: float
    num_running: int
    num_waiting: int
    steps_by_tokens: tuple[int, ...]
    steps_by_inter_token: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRates:
    """One process now; tokens_per_s and steps once two looks tell them."""

    name: str
    role: str
    address: str
    is_ready: bool
    detail: str
    num_requests: int
    num_waiting: int
    num_blocks_used: int
    num_blocks: int
    tokens_per_s: float | None
    steps: StepRates | None
    rss_num_bytes: int
    uptime_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The whole mesh now; the gateway is the first instance. rates: None until two looks."""

    model: str
    rates: StepRates | None
    instances: tuple[InstanceRates, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What a process did in so many seconds of its own clock; steps are zero but for ranks."""

    seconds: float
    num_tokens: int
    steps: status_pb2.DecodeSteps = field(default_factory=status_pb2.DecodeSteps)


class RateTracker:
    """Remembers each process's last status; `observe` takes the next ones."""

    def __init__(self) -> None:
        self._statuses: dict[tuple[int, str], status_pb2.InstanceStatus] = {}
        self._intervals: dict[tuple[int, str], Interval] = {}

    def observe(self, statuses: Sequence[status_pb2.InstanceStatus]) -> Board:
        """The board, with rates since the status of each process that was different."""
        intervals = {_key(status): self._interval(status) for status in statuses}
        self._statuses = {_key(status): status for status in statuses}
        self._intervals = {key: i for key, i in intervals.items() if i is not None}
        ranks = [
            self._intervals[_key(status)]
            for status in statuses
            if status.HasField("decode_steps") and _key(status) in self._intervals
        ]
        ordinals: dict[int, int] = {}
        instances: list[InstanceRates] = []
        for status in statuses:
            ordinal = ordinals[status.role] = ordinals.get(status.role, -1) + 1
            instances.append(_instance(status, ordinal, self._intervals.get(_key(status))))
        models = [status.model.name for status in statuses if status.HasField("model")]
        return Board(
            model=models[0] if models else "",
            rates=rates(ranks) if ranks else None,
            instances=tuple(instances),
        )

    def _interval(self, status: status_pb2.InstanceStatus) -> Interval | None:
        """Since the last look; the same as then while a living process has not been asked anew."""
        before = self._statuses.get(_key(status))
        if before is None or before.incarnation != status.incarnation:
            return None
        if status.uptime_s <= before.uptime_s:
            return self._intervals.get(_key(status)) if status.ready else None
        return Interval(
            seconds=status.uptime_s - before.uptime_s,
            num_tokens=status.counts.num_tokens - before.counts.num_tokens,
            steps=difference(before.decode_steps, status.decode_steps),
        )


def difference(
    before: status_pb2.DecodeSteps, after: status_pb2.DecodeSteps
) -> status_pb2.DecodeSteps:
    """What was added; of what runs and waits, how it is now."""
    steps = status_pb2.DecodeSteps()
    for part in after.DESCRIPTOR.fields:
        old, new = getattr(before, part.name), getattr(after, part.name)
        if part.is_repeated:
            olds = list(old) or [0] * len(new)
            getattr(steps, part.name).extend(n - o for o, n in zip(olds, new, strict=True))
        else:
            setattr(steps, part.name, new if part.name in _GAUGES else new - old)
    return steps


def rates(intervals: Sequence[Interval]) -> StepRates:
    """The rates of ranks together: their rates summed, their steps in one histogram."""
    num_steps = _sum(intervals, "num_steps")
    times = {part: _sum(intervals, f"{part}_s") for part in PARTS}
    wasted = {name: _sum(intervals, f"num_{name}") for name in WASTED}
    time_s = sum(times.values())
    num_tokens = _sum(intervals, "num_delivered") + sum(wasted.values())
    by_tokens = _histogram(intervals, "steps_by_tokens", len(buckets.COUNTS) + 1)
    by_inter_token = _histogram(intervals, "steps_by_inter_token", len(buckets.PER_TOKEN_S) + 1)
    return StepRates(
        tokens_per_s=_rate(intervals, "num_delivered"),
        steps_per_s=_rate(intervals, "num_steps"),
        step_tokens_p50=quantile(by_tokens, buckets.COUNTS, 0.5, is_whole=True),
        step_tokens_p95=quantile(by_tokens, buckets.COUNTS, 0.95, is_whole=True),
        inter_token_p50_s=quantile(by_inter_token, buckets.PER_TOKEN_S, 0.5),
        inter_token_p95_s=quantile(by_inter_token, buckets.PER_TOKEN_S, 0.95),
        parts_s={part: s / num_steps for part, s in times.items()} if num_steps else None,
        gap_share=times["gap"] / time_s if time_s else None,
        wasted_shares={k: n / num_tokens for k, n in wasted.items()} if num_tokens else None,
        wasted_share=sum(wasted.values()) / num_tokens if num_tokens else None,
        preemptions_per_s=_rate(intervals, "num_preemptions"),
        num_running=int(_sum(intervals, "num_running")),
        num_waiting=int(_sum(intervals, "num_waiting")),
        steps_by_tokens=by_tokens,
        steps_by_inter_token=by_inter_token,
    )


def quantile(
    counts: Sequence[int], bounds: Sequence[float], q: float, *, is_whole: bool = False
) -> float | None:
    """The q-quantile of a histogram, interpolated within its bucket; None of an empty one.

    is_whole: of whole numbers, rounded up to one: the bucket from above 2 to 4 holds 3 and 4.
    Beyond the last bound the last bound is all that is known.
    """
    rank, num_below = q * sum(counts), 0
    lows = (0.0, *bounds)
    for low, high, count in zip(lows, (*bounds, bounds[-1]), counts, strict=True):
        if count and num_below + count >= rank:
            value = low + (high - low) * (rank - num_below) / count
            return float(math.ceil(value)) if is_whole else value
        num_below += count
    return None


def _instance(
    status: status_pb2.InstanceStatus, ordinal: int, interval: Interval | None
) -> InstanceRates:
    role = status_pb2.Role.Name(status.role).removeprefix("ROLE_").lower()
    counts = status.counts
    return InstanceRates(
        name=f"{role} {ordinal}",
        role=role,
        address=status.address,
        is_ready=status.ready,
        detail=status.detail,
        num_requests=counts.num_requests,
        num_waiting=counts.num_waiting,
        num_blocks_used=counts.num_blocks_used,
        num_blocks=counts.num_blocks,
        tokens_per_s=interval.num_tokens / interval.seconds if interval else None,
        steps=rates([interval]) if interval and status.HasField("decode_steps") else None,
        rss_num_bytes=counts.rss_num_bytes,
        uptime_s=status.uptime_s,
    )


def _key(status: status_pb2.InstanceStatus) -> tuple[int, str]:
    return status.role, status.address


def _sum(intervals: Sequence[Interval], name: str) -> float:
    return sum(getattr(interval.steps, name) for interval in intervals)


def _rate(intervals: Sequence[Interval], name: str) -> float:
    return sum(getattr(interval.steps, name) / interval.seconds for interval in intervals)


def _histogram(intervals: Sequence[Interval], name: str, length: int) -> tuple[int, ...]:
    rows = [getattr(interval.steps, name) for interval in intervals]
    return tuple(sum(column) for column in zip([0] * length, *rows, strict=True))
