"""Meshes shared by the end-to-end tests: one per model family, and one with two of everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mesh import Mesh, running_mesh
from tests.support.tiny_models import FAMILIES, make_tiny_model


@pytest.fixture(scope="session", params=FAMILIES)
def family_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of each family."""
    path = tmp_path_factory.mktemp(request.param)
    make_tiny_model(request.param, path)
    return path


@pytest.fixture(scope="session")
def family_mesh(family_model: Path) -> Iterator[Mesh]:
    """One of each service for the family's model."""
    with running_mesh(family_model) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny random model."""
    path = tmp_path_factory.mktemp("qwen3")
    make_tiny_model("qwen3", path)
    return path


@pytest.fixture(scope="module")
def wide_mesh(tiny_model: Path) -> Iterator[Mesh]:
    """Two prefills, two decode ranks, two kvstores."""
    with running_mesh(tiny_model, num_prefill=2, num_decode=2, num_kvstore=2) as mesh:
        yield mesh


@pytest.fixture
def fresh_mesh(tiny_model: Path) -> Iterator[Mesh]:
    """A mesh of its own, for tests that break it."""
    with running_mesh(tiny_model) as mesh:
        yield mesh
