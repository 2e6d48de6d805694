"""The kvstore behind a network that loses its control path or its data path, not both: answers stay
exact, bounded, and both paths are found again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.books import Books
from tests.support.mesh import Mesh, Process, spawn
from tests.support.mixture import Mixture
from tests.support.netns import CONTROL, DATA, Namespace
from tests.support.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow
BOUND_S = 40.0  # a pull gives up after 10 s; a busy machine of two cores gets four times that


class PartedMesh(Mesh):
    """Two of each worker here, the store in the namespace; NIXL over TCP on the data link."""

    def __init__(self, model: Path, namespace: Namespace) -> None:
        self._namespace = namespace
        tcp = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": namespace.device(DATA)}
        flags = ("--private-ttl-s", "10", "--quarantine-s", "2")
        super().__init__(model, num_prefill=2, num_decode=2, store_flags=flags, env=tcp)

    def spawn_store(self, *, port: int = 0) -> Process:
        """Starts it behind the links."""
        return spawn(
            "kvstore",
            *(*self._store_flags, "--port", str(port), "--host", self._namespace.host),
            env={"UCX_TLS": "tcp", "UCX_NET_DEVICES": f"{DATA}-in"},
            prefix=self._namespace.prefix,
        )


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    """Skips where namespaces cannot be made."""
    try:
        made = Namespace()
    except OSError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture(scope="module")
def mesh(namespace: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The mesh with its store behind the links."""
    path = tmp_path_factory.mktemp("parted")
    make_tiny_model("qwen3", path)
    parted = PartedMesh(path, namespace)
    try:
        yield parted
    finally:
        parted.close()


@pytest.mark.parametrize("link", [CONTROL, DATA])
def test_a_black_hole_costs_time_within_a_bound_and_no_token(
    mesh: Mesh, namespace: Namespace, link: str
) -> None:
    for worker in (*mesh.prefills, *mesh.decodes):
        assert mesh.status(worker.address).detail.endswith("up (write)")
    mixture = Mixture(mesh)
    cached = mixture.start(mesh)
    mixture.verify(cached)
    books = Books(mesh, timeout_s=60.0)  # leases whose answers were lost in an earlier cut end
    num_lines = {id(worker): len(worker.lines) for worker in (*mesh.prefills, *mesh.decodes)}
    under_way = mixture.start(mesh)
    under_way[0].wait_tokens(1)
    with namespace.cut(link):
        cut_at = time.monotonic()
        mixture.verify(under_way)
        mixture.verify(mixture.start(mesh))
        assert time.monotonic() - cut_at < 2 * BOUND_S
        print(f"{link} lost: answers after {time.monotonic() - cut_at:.1f} s")
    lines = [line for w in (*mesh.prefills, *mesh.decodes) for line in w.lines[num_lines[id(w)] :]]
    assert any(" down: " in line for line in lines), "nobody noticed"
    books.lose()
    books.settle(expects_promises=True, timeout_s=60.0)
    mixture.verify(mixture.start(mesh))
