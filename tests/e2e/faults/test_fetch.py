"""Faults while the store WRITEs to a reader over TCP: nobody takes the other along, blocks that a
late WRITE may touch are not used, and answers are exact.

A Fetch waits at the gate while its reader or its store is stopped, and then goes nowhere.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from protos import kvstore_pb2
from tests.support.books import Books
from tests.support.gated_mesh import STORE, GatedMesh
from tests.support.injectors import frozen, incarnation_of, is_stopped, kill, revive
from tests.support.mesh import Process
from tests.support.mixture import Mixture, salted
from tests.support.streams import Stream, same_answer
from tests.support.tiny_models import make_tiny_model

FETCH = f"{STORE}/Fetch"
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def gated_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatedMesh]:
    """As the others', but NIXL has TCP only, over one device: each costs every peer sockets."""
    path = tmp_path_factory.mktemp("fetch")
    make_tiny_model("qwen3", path)
    mesh = GatedMesh(path, {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"})
    try:
        yield mesh
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def mixture(gated_mesh: GatedMesh) -> Mixture:
    """Requests of every kind and what undisturbed runs answer."""
    return Mixture(gated_mesh)


@pytest.fixture(scope="module")
def books(gated_mesh: GatedMesh, mixture: Mixture) -> Books:
    """Baselines of a warm mesh."""
    mixture.verify(mixture.start(gated_mesh))
    return Books(gated_mesh)


@contextmanager
def fetching(mesh: GatedMesh, mixture: Mixture, stopped: str) -> Iterator[tuple[Stream, Process]]:
    """A request whose Fetch has reached the store, and its rank; `stopped`, rank or store, stops
    before that. Whoever it is must be woken or killed inside.
    """
    store = mesh.kvstores[0]
    gate = mesh.gate("decode", store)
    num_sent = len(gate.sent[FETCH])
    with gate.hold(FETCH) as hold:
        stream = Stream(mesh.generation, salted(mixture.requests[0]))
        hold.wait_reached()
        reader = kvstore_pb2.FetchRequest.FromString(hold.messages[0]).incarnation
        (rank,) = [process for process in mesh.decodes if incarnation_of(process) == reader]
        victim = rank if stopped == "rank" else store
        victim.popen.send_signal(signal.SIGSTOP)
        mesh.wait_until(lambda: is_stopped(victim), f"{victim.role} stops")
    mesh.wait_until(lambda: len(gate.sent[FETCH]) > num_sent, "the Fetch is forwarded")
    assert FETCH not in gate.seen or len(gate.seen[FETCH]) < len(gate.sent[FETCH])
    yield stream, rank


def test_a_reader_killed_during_a_fetch_leaves_the_store_alive(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh, store = gated_mesh, gated_mesh.kvstores[0]
    books.lose()
    num_lines = len(store.lines)

    def has_ended() -> bool:
        return any("a Fetch of" in line for line in store.lines[num_lines:])

    with fetching(mesh, mixture, stopped="rank") as (stream, rank):
        assert mesh.status(store.address).counts.num_leases and not has_ended()
        kill(rank)
        same_answer(stream.result(), mixture.expected[0])
    mesh.wait_until(has_ended, "the WRITE ends with its reader")
    assert store.popen.poll() is None
    revive(mesh, rank)
    books.settle(expects_promises=True)
    mixture.verify(mixture.start(mesh))


def test_a_store_killed_during_a_fetch_costs_recomputation(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh, store = gated_mesh, gated_mesh.kvstores[0]
    books.lose()
    with fetching(mesh, mixture, stopped="rank") as (stream, rank):
        kill(store)
        rank.popen.send_signal(signal.SIGCONT)
        same_answer(stream.result(), mixture.expected[0])
    revive(mesh, store)
    books.settle(expects_promises=True, timeout_s=PATIENCE_S)
    mixture.verify(mixture.start(mesh))


def test_blocks_of_a_frozen_stores_fetch_stay_in_quarantine_until_it_wakes(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh, store = gated_mesh, gated_mesh.kvstores[0]
    books.lose()

    def num_quarantined(rank: Process) -> int:
        return mesh.status(rank.address).counts.num_blocks_quarantined

    with fetching(mesh, mixture, stopped="store") as (stream, rank), frozen(mesh, store):
        same_answer(stream.result(PATIENCE_S), mixture.expected[0])
        mixture.verify(mixture.start(mesh))
        assert num_quarantined(rank), "the deadline gave the blocks free"
    books.settle(expects_promises=True, timeout_s=PATIENCE_S)
    assert not num_quarantined(rank)
    mixture.verify(mixture.start(mesh))
