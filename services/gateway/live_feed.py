"""The live page's figures: one frame a second of the whole mesh, as a server-sent event.

Owns the rates between frames. Makes nothing while nobody looks; never asks a process itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence

from mesh import buckets
from mesh.step_rates import RateTracker
from protos import status_pb2

_BOUNDS = {"tokens": buckets.COUNTS, "inter_token_s": buckets.PER_TOKEN_S}
# After so many intervals without a viewer, rates begin anew: nobody asked for an hour's mean.
_STALE_INTERVALS = 3


class LiveFeed:
    """Frames at whole multiples of interval_s, each made once, for whoever waits first.

    There is no queue: a viewer that is late gets the next frame and never those it missed.
    """

    def __init__(
        self,
        snapshot: Callable[[], Sequence[status_pb2.InstanceStatus]],
        interval_s: float = 1.0,
    ) -> None:
        self._snapshot = snapshot
        self._interval_s = interval_s
        self._tracker = RateTracker()
        self._number = 0
        self._frame = b""
        self._closed = asyncio.Event()

    async def next(self, after: int) -> tuple[int, bytes] | None:
        """Waits for the frame after that number; None once closed."""
        now = asyncio.get_running_loop().time()
        number = max(math.floor(now / self._interval_s), after) + 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), number * self._interval_s - now)
            return None
        if number > self._number:
            if number > self._number + _STALE_INTERVALS:
                self._tracker = RateTracker()
            self._number, self._frame = number, self._make()
        return number, self._frame

    def close(self) -> None:
        """Ends every wait."""
        self._closed.set()

    def _make(self) -> bytes:
        board = self._tracker.observe(self._snapshot())
        data = {"time_s": time.time(), "bounds": _BOUNDS, **dataclasses.asdict(board)}
        return f"data: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n".encode()
