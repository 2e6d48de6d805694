"""Requests that their callers have given up, by the attempt that each was named with.

Owns which attempts of the last minute were given back. A request that arrives after that, as slow
as the network may be, is granted nothing: its caller would never give it back again.
"""

from __future__ import annotations

from collections.abc import Iterable

# A request travels for 15 s at most: both ends drop a connection whose pings are not answered.
_KEEP_S = 60.0


class GivenUp:
    """Attempts by owner; one is forgotten after a minute."""

    def __init__(self) -> None:
        self._ended_at: dict[tuple[str, int], float] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._ended_at)

    def add(self, owner: str, attempts: Iterable[int], now: float) -> None:
        """Nothing is granted to these from now on."""
        for attempt in attempts:
            self._ended_at.pop((owner, attempt), None)
            self._ended_at[owner, attempt] = now

    def has(self, owner: str, attempt: int) -> bool:
        """Whether a request comes too late."""
        return (owner, attempt) in self._ended_at

    def expire(self, now: float) -> None:
        """Forgets those that nothing can arrive of any more."""
        while self._ended_at:
            oldest = next(iter(self._ended_at))
            if now - self._ended_at[oldest] < _KEEP_S:
                return
            del self._ended_at[oldest]
