"""A count of what still uses something that is to be closed. Owns the count, never the thing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Uses:
    """How many uses are under way; whoever wants to close the thing waits until there are none."""

    def __init__(self) -> None:
        self._num = 0
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return self._num

    def add(self, num: int = 1) -> None:
        """That many uses more."""
        self._num += num
        if self._num:
            self._none.clear()

    def drop(self, num: int = 1) -> None:
        """That many uses are over."""
        assert self._num >= num, f"{num} uses ended of {self._num}"
        self._num -= num
        if not self._num:
            self._none.set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """One use for the length of a with block."""
        self.add()
        try:
            yield
        finally:
            self.drop()

    async def gone(self, timeout_s: float) -> bool:
        """Waits until there are none; False after timeout_s seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._num:  # one may have come before this task was woken
                    await self._none.wait()
        return not self._num
