"""One frame of `kvmesh top` as lines of text: figures, history, instances, heat maps.

Owns the look. The figures are mesh/step_rates.py's, those of the live page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvmesh.console import table
from mesh import buckets
from mesh.step_rates import PARTS, WASTED, Board, InstanceRates, StepRates

Segment = tuple[str, int]  # text and its SGR code; 0 is plain
Line = list[Segment]

NOTHING = "–"
BOLD, DIM, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN = 1, 2, 31, 32, 33, 34, 35, 36
_PART_COLOURS: dict[str, int] = dict(zip(PARTS, (GREEN, CYAN, BLUE, MAGENTA, YELLOW), strict=True))
_PART_MARKS: dict[str, str] = dict(zip(PARTS, "█▓▒░·", strict=True))
_BARS = " ▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"
_LABEL_WIDTH = 12
_VALUE_WIDTH = 10
_MAX_HEAT_ROWS = 8
_TABLE = (
    "instance",
    "address",
    "state",
    "requests",
    "waiting",
    "blocks",
    "tokens/s",
    "gap",
    "up s",
)


def frame(boards: Sequence[Board], *, source: str, trouble: str, width: int) -> list[Line]:
    """The newest board, with the older ones as history; trouble: why it is not the present one."""
    state: Segment = (trouble, RED) if trouble else ("live", GREEN)
    if not boards:
        return [[("kvmesh", BOLD), (f"  {source}  ", DIM), state]]
    board = boards[-1]
    lines: list[Line] = [
        [("kvmesh", BOLD), (f" {board.model}", 0), (f"  {source}  ", DIM), state],
        *_figures(board.rates),
        [],
        *_parts(board.rates, width),
        *_history(boards, width),
        [],
        *_instances(board.instances),
    ]
    for title, bounds, pick, show in (
        ("tokens per step", buckets.COUNTS, lambda r: r.steps_by_tokens, "{:.0f}".format),
        ("inter-token", buckets.PER_TOKEN_S, lambda r: r.steps_by_inter_token, milliseconds),
    ):
        lines += [[], *_heat_map(title, boards, bounds, pick, show, width)]
    return lines


def paint(line: Line, *, width: int, is_coloured: bool) -> str:
    """The line as text of at most `width` characters."""
    painted = ""
    for text, code in line:
        text, width = text[:width], width - len(text[:width])
        painted += f"\x1b[{code}m{text}\x1b[0m" if is_coloured and code and text else text
    return painted.rstrip()


def milliseconds(seconds: float | None) -> str:
    """Such as 0.75 ms or 120 ms."""
    if seconds is None:
        return NOTHING
    number = seconds * 1e3
    return f"{number:.0f} ms" if number >= 100 else f"{number:.3g} ms"


def percent(share: float | None) -> str:
    """Such as 2.5 %."""
    return NOTHING if share is None else f"{share * 100:.1f} %"


def rate(value: float | None) -> str:
    """Such as 12.5 or 1,234."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _figures(rates: StepRates | None) -> Iterator[Line]:
    if rates is None:
        yield [("no decode rank has told of its steps twice yet", DIM)]
        return
    wasted = rates.wasted_shares or {}
    tokens = f"{_count(rates.step_tokens_p50)} p50, {_count(rates.step_tokens_p95)} p95"
    first = {
        "tokens/s": rate(rates.tokens_per_s),
        "steps/s": rate(rates.steps_per_s),
        "tokens per step": tokens,
        "inter-token": f"{milliseconds(rates.inter_token_p50_s)} p50, "
        f"{milliseconds(rates.inter_token_p95_s)} p95",
    }
    second = {
        "running": str(rates.num_running),
        "waiting": str(rates.num_waiting),
        "preempted": f"{rate(rates.preemptions_per_s)}/s",
        "gap": percent(rates.gap_share),
        "wasted": percent(rates.wasted_share),
        **{name: percent(wasted.get(name)) for name in WASTED if wasted.get(name)},
    }
    for figures in (first, second):
        yield [
            segment
            for name, value in figures.items()
            for segment in ((f"{name} ", DIM), (value, BOLD), ("   ", 0))
        ]


def _history(boards: Sequence[Board], width: int) -> Iterator[Line]:
    num_columns = max(1, width - _LABEL_WIDTH - _VALUE_WIDTH - 2)
    shown = [board.rates for board in boards[-num_columns:]]
    if sum(rates is not None for rates in shown) < 2:
        return
    for name, pick, show in (
        ("tokens/s", lambda r: r.tokens_per_s, rate),
        ("steps/s", lambda r: r.steps_per_s, rate),
        ("running", lambda r: r.num_running, "{:.0f}".format),
        ("gap", lambda r: r.gap_share, percent),
    ):
        values = [None if rates is None else pick(rates) for rates in shown]
        most = max((value for value in values if value is not None), default=0.0)
        bars = "".join(_level(value, most, _BARS) for value in values)
        yield [
            (name.ljust(_LABEL_WIDTH), DIM),
            (bars.ljust(num_columns), GREEN),
            (f"  max {show(most)}", DIM),
        ]


def _parts(rates: StepRates | None, width: int) -> Iterator[Line]:
    """A step's mean time as a bar of its parts; each is named, with its mark, below."""
    bar: Line = [("step time".ljust(_LABEL_WIDTH), DIM)]
    if rates is None or rates.parts_s is None:
        yield [*bar, (NOTHING, 0)]
        return
    names: Line = [(" " * _LABEL_WIDTH, 0)]
    total_s = sum(rates.parts_s.values())
    num_columns = max(10, width - _LABEL_WIDTH - _VALUE_WIDTH - 2)
    for part, seconds in rates.parts_s.items():
        length = round(num_columns * seconds / total_s) if total_s else 0
        bar.append((_PART_MARKS[part] * length, _PART_COLOURS[part]))
        names.append((f"{_PART_MARKS[part]} ", _PART_COLOURS[part]))
        names.append((f"{part} {milliseconds(seconds)}  ", 0))
    yield [*bar, (f"  {milliseconds(total_s)}", BOLD)]
    yield names


def _instances(instances: Sequence[InstanceRates]) -> Iterator[Line]:
    rows = [
        (
            instance.name,
            instance.address,
            "ready" if instance.is_ready else "not ready",
            str(instance.num_requests),
            str(instance.num_waiting),
            f"{instance.num_blocks_used}/{instance.num_blocks}" if instance.num_blocks else NOTHING,
            rate(instance.tokens_per_s) if instance.role in ("prefill", "decode") else NOTHING,
            percent(instance.steps.gap_share) if instance.steps else NOTHING,
            f"{instance.uptime_s:.0f}",
        )
        for instance in instances
    ]
    header, *lines = table(_TABLE, rows).splitlines()
    yield [(header, DIM)]
    for instance, line in zip(instances, lines, strict=True):
        yield [(line, 0 if instance.is_ready else RED)]
    for instance in instances:
        if not instance.is_ready:
            yield [(f"{instance.name}: {instance.detail or 'not ready'}", RED)]


def _heat_map(
    title: str,
    boards: Sequence[Board],
    bounds: Sequence[float],
    pick: Callable[[StepRates], tuple[int, ...]],
    show: Callable[[float], str],
    width: int,
) -> Iterator[Line]:
    """Time to the right, buckets upwards, darker for more steps; the rows with most steps."""
    num_columns = max(1, width - _LABEL_WIDTH)
    columns = [pick(board.rates) if board.rates else () for board in boards[-num_columns:]]
    sums = [sum(counts) for counts in zip(*filter(None, columns), strict=True)]
    yield [(f"{title}, steps by upper bound", DIM)]
    if not any(sums):
        yield [(NOTHING, DIM)]
        return
    for row in _fullest_rows(sums):
        label = f"≤ {show(bounds[row])}" if row < len(bounds) else f"> {show(bounds[-1])}"
        cells = "".join(_level(c[row], max(c), _SHADES) if any(c) else " " for c in columns)
        yield [(f"{label:>{_LABEL_WIDTH - 1}} ", DIM), (cells, CYAN)]


def _fullest_rows(sums: Sequence[int]) -> Sequence[int]:
    """The highest first: all that have steps, or the neighbours that together have the most."""
    used = [row for row, count in enumerate(sums) if count]
    num_rows = min(_MAX_HEAT_ROWS, used[-1] - used[0] + 1)
    firsts = range(used[0], used[-1] - num_rows + 2)
    first = max(firsts, key=lambda first: sum(sums[first : first + num_rows]))
    return range(first + num_rows - 1, first - 1, -1)


def _level(value: float | None, most: float, marks: str) -> str:
    """The mark for a share of the most; nothing only for nothing."""
    if not value or not most:
        return marks[0]
    return marks[max(1, round(value / most * (len(marks) - 1)))]


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f}"
