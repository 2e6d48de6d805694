"""Blocks on their way into the store when their prompt ends before they are there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from engine.block_pool import BlockPool
from services.prefill.sending import Sending

PATIENCE_S = 10.0
BLOCK = 3


class Publishing:
    """WRITEs that end when `written` is set."""

    def __init__(self) -> None:
        self.written = asyncio.Event()
        self.events: list[tuple[str, int]] = []

    async def reserve(self, deadline: object) -> None:
        pass

    async def send(
        self, first: int, block_ids: list[int], deadline: object, may_seal: asyncio.Future[bool]
    ) -> int:
        self.events.append(("write", first))
        await self.written.wait()
        await asyncio.shield(may_seal)
        self.events.append(("seal", first))
        return len(block_ids)

    def close(self) -> None:
        pass


class Worker:
    """The part of a worker that sends; tails are cleared once `may_clear` is set."""

    def __init__(self) -> None:
        self.publishing = Publishing()
        self.store = SimpleNamespace(publish=lambda *_, **__: self.publishing)
        self.runner = SimpleNamespace(cache=self)
        self.pool = BlockPool(8, 4)
        self.may_clear, self.clearing = threading.Event(), threading.Event()
        self._settled = ThreadPoolExecutor(1)

    def zero_block_tail(self, block: int, num_tokens: int) -> None:
        self.clearing.set()
        assert self.may_clear.wait(PATIENCE_S)

    async def on_settled(self, fn: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._settled, fn, *args)

    def release(self, block_ids: list[int]) -> None:
        self.pool.free(block_ids)

    def sending(self) -> Sending:
        worker: Any = self
        return Sending(worker, [b"k"] * 4, 0, b"t" * 32, "tenant")


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_closing_ends_all_that_is_sent_even_just_after_a_send() -> None:
    worker = Worker()
    sending = worker.sending()
    sending.send(0, [0, 1])
    sending.seal()
    await turns()
    assert worker.publishing.events == [("write", 0)]
    sending.send(2, [2, 3])
    sending.seal()
    sending.close()  # from here on the blocks are free
    worker.publishing.written.set()
    await turns()
    assert worker.publishing.events == [("write", 0)], "sealed what may be another's KV"


async def test_a_tail_is_nobodys_until_the_thread_has_cleared_it() -> None:
    worker = Worker()
    worker.pool.allocate(8)
    sending = worker.sending()
    sending.send_tail(BLOCK, 1)
    await asyncio.to_thread(worker.clearing.wait, PATIENCE_S)
    sending.close()
    worker.release([BLOCK])
    await turns()
    assert worker.pool.num_free == 0, "another's KV would be cleared"
    worker.may_clear.set()
    async with asyncio.timeout(PATIENCE_S):
        while not worker.pool.num_free:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    worker.pool.check()
