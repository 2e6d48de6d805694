"""Draining under load: SIGTERM of one of two peers, and of everything one after the other, with no
failed request and no changed answer.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.books import Books
from tests.support.gated_mesh import GatedMesh
from tests.support.injectors import incarnation_of
from tests.support.mesh import Mesh, Process, running_mesh, wait_ready
from tests.support.mixture import Mixture
from tests.support.tiny_models import make_tiny_model

NUM_LOOPS = 2


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two of each worker role, without gates."""
    path = tmp_path_factory.mktemp("rolling")
    make_tiny_model("qwen3", path)
    with running_mesh(path, num_prefill=2, num_decode=2, num_kvstore=2) as wide:
        yield wide


class Load:
    """Requests of every kind in a loop; `num_done` counts rounds, `failures` says what broke."""

    def __init__(self, mesh: Mesh, mixture: Mixture) -> None:
        self._mesh, self._mixture = mesh, mixture
        self._over = threading.Event()
        self.num_done = 0
        self.failures: list[BaseException] = []
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(NUM_LOOPS)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Load while inside; fails if any request failed or changed."""
        for thread in self.threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self.threads:
                thread.join(60)
        if self.failures:
            raise self.failures[0]

    def wait_rounds(self, num_rounds: int) -> None:
        """Until that many more rounds are over, or one failed."""
        wanted = self.num_done + num_rounds
        self._mesh.wait_until(lambda: self.failures or self.num_done >= wanted, "load goes on")

    def _run(self) -> None:
        while not self._over.is_set() and not self.failures:
            try:
                self._mixture.verify(self._mixture.start(self._mesh))
                self.num_done += 1
            except BaseException as failure:
                self.failures.append(failure)


def _roll(mesh: Mesh, process: Process) -> None:
    """SIGTERM, a clean end, a successor on the same address."""
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(30) == 0, process.tail()
    successor = mesh.respawn(process)
    wait_ready(successor)
    assert incarnation_of(successor) != incarnation_of(process)


def test_one_of_two_peers_drains_under_load_without_a_failed_request(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh = gated_mesh
    load = Load(mesh, mixture)
    with load.running():
        for process in (mesh.decodes[0], mesh.prefills[0]):
            load.wait_rounds(1)
            _roll(mesh, process)
            books.lose()
        load.wait_rounds(1)
    books.settle(expects_promises=True)


@pytest.mark.slow
def test_every_worker_and_store_is_restarted_under_load_without_a_failed_request(
    mesh: Mesh,
) -> None:
    mixture = Mixture(mesh)
    mixture.verify(mixture.start(mesh))
    books = Books(mesh)
    load = Load(mesh, mixture)
    with load.running():
        load.wait_rounds(1)
        for process in [*mesh.prefills, *mesh.decodes, *mesh.kvstores]:
            _roll(mesh, process)
            books.lose()
            load.wait_rounds(1)
    books.settle(expects_promises=True, timeout_s=40.0)


@pytest.mark.slow
def test_a_gateway_finishes_its_requests_before_it_ends(mesh: Mesh) -> None:
    mixture = Mixture(mesh)
    streams = mixture.start(mesh)
    streams[0].wait_tokens(1)
    _roll(mesh, mesh.gateway)
    mixture.verify(streams)
    mixture.verify(mixture.start(mesh))
    Books(mesh)
