"""Deadlines, cancellation and late transfers, over a backend that finishes when a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from kv.errors import TransferError, TransferTimeout
from kv.thread_transfer import ThreadTransfer
from kv.transfer import Agent, Spans
from kv.transfer_thread import TransferThread

ARENA = 256 * 2**20
PATIENCE_S = 20.0


class ManualBackend:
    """Posts at once; a part is over when `finish` is set, and fails when `error` is."""

    def __init__(self) -> None:
        self.parts: list[Spans] = []
        self.posted = threading.Semaphore(0)
        self.finish = threading.Event()
        self.error = ""
        self.num_released = 0
        self.is_closed = False

    def add_peer(self, agent: Agent) -> None:
        pass

    def remove_peer(self, name: str) -> None:
        pass

    def post(self, operation: str, peer: str, part: Spans) -> object:
        self.parts.append(part)
        self.posted.release()
        return object()

    def is_done(self, peer: str, handle: object) -> bool:
        if self.error:
            raise TransferError(peer, self.error)
        return self.finish.is_set()

    def release(self, handle: object) -> None:
        self.num_released += 1

    def drain(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


def _agent(name: str) -> Agent:
    return Agent(
        name=name,
        nixl_version="1",
        metadata=b"",
        arena_address=4096,
        arena_num_bytes=ARENA,
        incarnation=name,
        host_id="here",
    )


@pytest.fixture
def backend() -> ManualBackend:
    return ManualBackend()


@pytest.fixture
async def transfer(backend: ManualBackend) -> AsyncIterator[ThreadTransfer]:
    thread = TransferThread(lambda: backend)
    thread.start()
    ours = ThreadTransfer(
        agent=_agent("us"), backend=backend, thread=thread, loop=asyncio.get_running_loop()
    )
    await ours.connect(_agent("peer"))
    yield ours
    ours.close()


async def _posted(backend: ManualBackend) -> None:
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(None, backend.posted.acquire, True, PATIENCE_S)


async def test_a_timeout_leaves_settled_open_until_the_transfer_is_over(
    transfer: ThreadTransfer, backend: ManualBackend
) -> None:
    with pytest.raises(TransferTimeout) as caught:
        await transfer.read("peer", [0], [0], 8, 0.01)
    settled = caught.value.settled
    await transfer.connect(_agent("other"))  # one round through the owner thread
    assert not settled.done()
    backend.finish.set()
    await asyncio.wait_for(settled, PATIENCE_S)
    assert backend.num_released == 1


async def test_a_cancelled_read_hands_its_future_over_before_it_raises(
    transfer: ThreadTransfer, backend: ManualBackend
) -> None:
    late: list[asyncio.Future[None]] = []
    read = asyncio.ensure_future(transfer.read("peer", [0], [0], 8, PATIENCE_S, late.append))
    await _posted(backend)
    read.cancel()
    with pytest.raises(asyncio.CancelledError):
        await read
    assert len(late) == 1 and not late[0].done()
    backend.finish.set()
    await asyncio.wait_for(late[0], PATIENCE_S)


async def test_what_was_not_posted_at_the_deadline_never_is(
    transfer: ThreadTransfer, backend: ManualBackend
) -> None:
    with pytest.raises(TransferTimeout) as caught:
        await transfer.write("peer", [0], [0], 200 * 2**20, 0.05)
    num_posted = len(backend.parts)
    backend.finish.set()
    await asyncio.wait_for(caught.value.settled, PATIENCE_S)
    assert len(backend.parts) == num_posted == 2


async def test_large_runs_go_out_in_parts_that_cover_all_of_it(
    transfer: ThreadTransfer, backend: ManualBackend
) -> None:
    backend.finish.set()
    await transfer.write("peer", [0], [0], 200 * 2**20, PATIENCE_S)
    assert max(int(part.lengths.sum()) for part in backend.parts) <= 64 * 2**20
    assert sum(int(part.lengths.sum()) for part in backend.parts) == 200 * 2**20


async def test_a_failure_stops_the_rest_and_raises_when_all_is_over(
    transfer: ThreadTransfer, backend: ManualBackend
) -> None:
    backend.error = "it broke"
    with pytest.raises(TransferError, match="peer peer: it broke"):
        await transfer.read("peer", [0], [0], 200 * 2**20, PATIENCE_S)
    assert len(backend.parts) == backend.num_released == 2


async def test_close_ends_what_is_in_flight(
    transfer: ThreadTransfer, backend: ManualBackend
) -> None:
    read = asyncio.ensure_future(transfer.read("peer", [0], [0], 8, PATIENCE_S))
    await _posted(backend)
    transfer.close()
    with pytest.raises(TransferError, match="closed"):
        await read
    assert backend.is_closed


async def test_no_blocks_is_no_transfer(transfer: ThreadTransfer, backend: ManualBackend) -> None:
    await transfer.read("peer", [], [], 8, PATIENCE_S)
    assert backend.parts == []
