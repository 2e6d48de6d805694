"""Prometheus' programs, and one run of the demo mesh that a Prometheus watched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dashboards.watched_mesh import watched_mesh
from tests.support.prometheus import Programs, Prometheus, find_programs


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest) -> Programs:
    """Skips, saying why, where Prometheus cannot be had."""
    cache = request.config.cache
    assert cache is not None
    try:
        return find_programs(Path(os.fspath(cache.mkdir("prometheus"))))
    except OSError as error:
        pytest.skip(f"no Prometheus here, boards and alerts are NOT tested against one: {error}")


@pytest.fixture(scope="session")
def prometheus(
    programs: Programs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """What Prometheus saw of a mesh under the scripted load; the mesh still runs."""
    with watched_mesh(programs, tmp_path_factory.mktemp("prometheus")) as server:
        yield server
