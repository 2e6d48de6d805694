"""Work that belongs to a process, not to a request: it goes on when whoever began it is cancelled.

Owns the tasks. Never raises a store's trouble; it was counted where it happened.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from mesh.kvstore_shard import TROUBLE

log = logging.getLogger("kvmesh.kvstore")

T = TypeVar("T")


class Background:
    """Tasks that belong to the client, not to a request."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs a coroutine to its end, whatever happens to the caller."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def keep(
        self, coroutine: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, object]]
    ) -> T:
        """Awaits a coroutine that goes on when the caller is cancelled, then to be undone."""
        task = self.spawn(coroutine)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                self.spawn(self._undo(task, undo))
            raise

    async def close(self, timeout_s: float) -> None:
        """Waits for what runs, and for what that begins, then cancels the rest."""
        ends_at = time.monotonic() + timeout_s
        while self._tasks and (left_s := ends_at - time.monotonic()) > 0:
            await asyncio.wait(set(self._tasks), timeout=left_s)
        rest = list(self._tasks)
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)

    async def _undo(
        self, task: asyncio.Task[T], undo: Callable[[T], Coroutine[Any, Any, object]]
    ) -> None:
        try:
            result = await task
        except TROUBLE:
            return
        await undo(result)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, TROUBLE):
            log.error("background work failed", exc_info=error)
