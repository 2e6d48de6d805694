"""One mesh with gates for all fault cases: each case leaves it as it found it, proven by books."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.books import Books
from tests.support.gated_mesh import GatedMesh
from tests.support.injectors import revive
from tests.support.mixture import Mixture
from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def gated_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatedMesh]:
    """Two prefills, two decode ranks, one kvstore, a gate on every hop."""
    path = tmp_path_factory.mktemp("faults")
    make_tiny_model("qwen3", path)
    mesh = GatedMesh(path)
    try:
        yield mesh
    finally:
        mesh.close()


@pytest.fixture(scope="session")
def mixture(gated_mesh: GatedMesh) -> Mixture:
    """Requests of every kind and what undisturbed runs answer."""
    return Mixture(gated_mesh)


@pytest.fixture(scope="session")
def books(gated_mesh: GatedMesh, mixture: Mixture) -> Books:
    """Baselines of a warm mesh."""
    mixture.verify(mixture.start(gated_mesh))
    return Books(gated_mesh)


@pytest.fixture(autouse=True)
def whole(gated_mesh: GatedMesh) -> Iterator[None]:
    """A case that failed half-way must not fail those after it; what was logged is shown."""
    for process in gated_mesh.processes:
        if process.popen.poll() is not None:
            revive(gated_mesh, process)
    logged = {id(process): len(process.lines) for process in gated_mesh.processes}
    yield
    for process in gated_mesh.processes:
        lines = process.lines[logged.get(id(process), 0) :]
        print(f"--- {process.role} {process.address}", *lines[-40:], sep="\n")
