"""One run of a mesh that tells everything, under a load in which everything happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.canaries import Canaries
from tests.support.loud_clients import LoudClients
from tests.support.loud_faults import LoudFaults
from tests.support.loud_mesh import LoudMesh
from tests.support.loud_requests import Asker, metadata
from tests.support.tiny_models import make_tiny_model


@dataclass(frozen=True)
class LoudRun:
    """The mesh after the load, and the secrets that it was told."""

    mesh: LoudMesh
    canaries: Canaries


@pytest.fixture(scope="session")
def loud_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoudRun]:
    """After the whole load; the mesh still runs."""
    model, canaries = tmp_path_factory.mktemp("loud"), Canaries()
    make_tiny_model("qwen3", model)
    mesh = LoudMesh(model, tmp_path_factory.mktemp("disk"), metadata(canaries))
    try:
        asker = Asker(mesh, canaries)
        LoudClients(asker).run()
        LoudFaults(asker).run()
        yield LoudRun(mesh, canaries)
    finally:
        mesh.close()
