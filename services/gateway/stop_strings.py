"""Finds stop strings in text that arrives in pieces.

Owns the text held back because a stop string may begin in it; never sees tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """One sequence's stop strings and the text held back for them.

    The occurrence that ends first wins, the longest among those that end together, so the outcome
    does not depend on how the text was cut into pieces.
    """

    __slots__ = ("_held", "_ignored_len", "_include", "_stops")

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._include = include
        self._held = ""
        self._ignored_len = 0  # an occurrence within this many first held characters is no match

    def push(self, text: str, *, enabled: bool) -> tuple[str, str | None]:
        """Takes new text; returns what may be shown now and the stop string that matched, if any.

        While not `enabled`, an occurrence that ends in this text is passed over. After a match the
        rest of the text is dropped and the matcher must not be used again.
        """
        if not self._stops or not text:
            return text, None
        buffer = self._held + text
        if not enabled:
            self._ignored_len = len(buffer)
        elif (match := self._first_match(buffer)) is not None:
            end, stop = match
            return buffer[: end if self._include else end - len(stop)], stop
        num_held = max(_held_len(buffer, stop) for stop in self._stops)
        cut = len(buffer) - num_held
        self._held = buffer[cut:]
        self._ignored_len = max(0, self._ignored_len - cut)
        return buffer[:cut], None

    def flush(self) -> str:
        """The held text, at the sequence's end."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str) -> tuple[int, str] | None:
        """End of the first occurrence that ends after the ignored text, and its stop string."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop, max(0, self._ignored_len - len(stop) + 1))
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or (end, -len(stop)) < (best[0], -len(best[1])):
                best = (end, stop)
        return best


def _held_len(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
