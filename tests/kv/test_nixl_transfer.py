"""Real NIXL between two real processes."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv.errors import PeerVersionMismatch, TransferError, TransferTimeout
from kv.nixl_transfer import NixlTransfer
from kv.transfer import Agent

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 64 * 1024
NUM_BLOCKS = 256
NUM_BYTES = NUM_BLOCKS * BLOCK
PATIENCE_S = 20.0


class Child:
    """The owner of the other arena."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("arena_owner.py")), str(NUM_BYTES)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._agent: Agent | None = None

    @property
    def agent(self) -> Agent:
        if self._agent is None:
            fields = self._read()
            self._agent = Agent(**{**fields, "metadata": bytes.fromhex(fields["metadata"])})
        return self._agent

    def ask(self, **question: int) -> str:
        assert self.agent  # its line comes before all answers
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(question) + "\n")
        self.popen.stdin.flush()
        return self._read()

    def stop(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)
        os.waitpid(self.popen.pid, os.WUNTRACED)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def _read(self) -> Any:
        assert self.popen.stdout is not None
        return json.loads(self.popen.stdout.readline())


@pytest.fixture
def child() -> Iterator[Child]:
    owner = Child()
    yield owner
    owner.kill()
    for stream in (owner.popen.stdin, owner.popen.stdout):
        if stream is not None:
            stream.close()


@pytest.fixture
def arena() -> np.ndarray[Any, Any]:
    return np.zeros(NUM_BYTES, dtype=np.uint8)


@pytest.fixture
async def transfer(child: Child, arena: np.ndarray[Any, Any]) -> AsyncIterator[NixlTransfer]:
    loop = asyncio.get_running_loop()
    ours = NixlTransfer.create(role="test", incarnation="parent", arena=arena, loop=loop)
    yield ours
    ours.close()


def _random(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, NUM_BYTES, np.uint8)


async def test_written_blocks_are_read_back(
    child: Child, transfer: NixlTransfer, arena: np.ndarray[Any, Any]
) -> None:
    await transfer.connect(child.agent)
    source = _random(1)
    arena[:] = source
    order = np.random.default_rng(2).permutation(NUM_BLOCKS)
    local = np.arange(NUM_BLOCKS) * BLOCK
    await transfer.write(child.agent.name, local, order * BLOCK, BLOCK, PATIENCE_S)
    there = np.empty_like(source).reshape(NUM_BLOCKS, BLOCK)
    there[order] = source.reshape(NUM_BLOCKS, BLOCK)
    assert child.ask() == hashlib.sha256(there.tobytes()).hexdigest()
    arena[:] = 0
    await transfer.read(child.agent.name, local, order * BLOCK, BLOCK, PATIENCE_S)
    np.testing.assert_array_equal(arena, source)


async def test_unaligned_runs_touch_nothing_else(
    child: Child, transfer: NixlTransfer, arena: np.ndarray[Any, Any]
) -> None:
    await transfer.connect(child.agent)
    child.ask(fill=3)
    theirs = _random(3)
    await transfer.read(child.agent.name, [5, 1000], [70001, 9], 333, PATIENCE_S)
    expected = np.zeros_like(arena)
    expected[5:338], expected[1000:1333] = theirs[70001:70334], theirs[9:342]
    np.testing.assert_array_equal(arena, expected)


async def test_runs_outside_either_arena_are_refused(child: Child, transfer: NixlTransfer) -> None:
    await transfer.connect(child.agent)
    name = child.agent.name
    with pytest.raises(ValueError, match=r"remote_offsets\[1\]: 16777215; .* arena of 16777216"):
        await transfer.read(name, [0, BLOCK], [0, NUM_BYTES - 1], BLOCK, PATIENCE_S)
    with pytest.raises(ValueError, match=r"local_offsets\[0\]: -1"):
        await transfer.write(name, [-1], [0], BLOCK, PATIENCE_S)
    with pytest.raises(ValueError, match=r"local_offsets\[0\]"):
        await transfer.read(name, [2**63], [0], BLOCK, PATIENCE_S)


async def test_another_version_is_refused_before_its_metadata_is_loaded(
    child: Child, transfer: NixlTransfer
) -> None:
    other = dataclasses.replace(child.agent, nixl_version="1.0.0", metadata=b"would crash")
    with pytest.raises(PeerVersionMismatch, match=r"'1\.0\.0' differs from ours, '1\.5\.1'"):
        await transfer.connect(other)
    with pytest.raises(TransferError, match="not connected"):
        await transfer.read(other.name, [0], [0], BLOCK, PATIENCE_S)


async def test_metadata_under_another_name_is_refused(child: Child, transfer: NixlTransfer) -> None:
    with pytest.raises(TransferError, match="its metadata is that of"):
        await transfer.connect(dataclasses.replace(child.agent, name="somebody-else"))
    await transfer.connect(child.agent)
    await transfer.read(child.agent.name, [0], [0], BLOCK, PATIENCE_S)


async def test_garbled_metadata_is_an_error(child: Child, transfer: NixlTransfer) -> None:
    with pytest.raises(TransferError):
        await transfer.connect(dataclasses.replace(child.agent, metadata=b"\0" * 64))


async def test_a_killed_peer_ends_transfers_long_before_their_deadline(
    child: Child, transfer: NixlTransfer
) -> None:
    await transfer.connect(child.agent)
    name, all_blocks = child.agent.name, np.arange(NUM_BLOCKS) * BLOCK
    first_is_over = asyncio.Event()

    async def read_for_ever() -> None:
        while True:
            await transfer.read(name, all_blocks, all_blocks[::-1].copy(), BLOCK, 600.0)
            first_is_over.set()

    reads = asyncio.ensure_future(read_for_ever())
    await asyncio.wait_for(first_is_over.wait(), PATIENCE_S)
    child.kill()
    with pytest.raises(TransferError) as caught:
        await asyncio.wait_for(reads, PATIENCE_S)
    assert not isinstance(caught.value, TransferTimeout)
    await transfer.disconnect(name)
    with pytest.raises(TransferError, match="not connected"):
        await transfer.read(name, [0], [0], BLOCK, PATIENCE_S)


async def _connect_stopped(child: Child, transfer: NixlTransfer) -> None:
    """Stops the child before the agents have met: once they have, CMA needs nothing of the peer."""
    agent = child.agent
    child.stop()
    await transfer.connect(agent)


async def test_a_hung_peer_times_out_and_settles_when_it_is_killed(
    child: Child, transfer: NixlTransfer
) -> None:
    late: list[asyncio.Future[None]] = []
    await _connect_stopped(child, transfer)
    with pytest.raises(TransferTimeout) as caught:
        await transfer.read(child.agent.name, [0], [0], BLOCK, 0.2, late.append)
    assert late == [caught.value.settled]
    assert not late[0].done()
    assert transfer.num_late == 1
    child.kill()
    await asyncio.wait_for(late[0], PATIENCE_S)
    assert transfer.num_late == 0


async def test_a_hung_peer_that_wakes_settles_the_late_transfer(
    child: Child, transfer: NixlTransfer, arena: np.ndarray[Any, Any]
) -> None:
    child.ask(fill=4)
    await _connect_stopped(child, transfer)
    with pytest.raises(TransferTimeout) as caught:
        await transfer.read(child.agent.name, [0], [0], BLOCK, 0.2)
    child.popen.send_signal(signal.SIGCONT)
    await asyncio.wait_for(caught.value.settled, PATIENCE_S)
    np.testing.assert_array_equal(arena[:BLOCK], _random(4)[:BLOCK])


async def test_closing_settles_what_is_late(child: Child, transfer: NixlTransfer) -> None:
    await _connect_stopped(child, transfer)
    with pytest.raises(TransferTimeout) as caught:
        await transfer.read(child.agent.name, [0], [0], BLOCK, 0.2)
    transfer.close()
    await asyncio.wait_for(caught.value.settled, PATIENCE_S)
    with pytest.raises(TransferError, match="closed"):
        await transfer.read(child.agent.name, [0], [0], BLOCK, 0.2)


async def test_disconnecting_settles_what_is_late(child: Child, transfer: NixlTransfer) -> None:
    await _connect_stopped(child, transfer)
    with pytest.raises(TransferTimeout) as caught:
        await transfer.read(child.agent.name, [0], [0], BLOCK, 0.2)
    await transfer.disconnect(child.agent.name)
    await asyncio.wait_for(caught.value.settled, PATIENCE_S)
