"""Real meshes whose store WRITEs the blocks: forced, and chosen where nothing is shared but TCP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.generate import generate, greedy_request
from tests.support.mesh import Mesh, Process, running_mesh, spawn
from tests.support.netns import DATA, Namespace
from tests.support.otlp_receiver import OtlpReceiver

PROMPTS = ([*range(200)], [*range(200), *range(50)], [*range(3, 100)])


class ApartMesh(Mesh):
    """The store in a network and a process namespace of its own; UCX is left to choose."""

    def __init__(self, model: Path, namespace: Namespace) -> None:
        self._namespace = namespace
        super().__init__(model, env={"UCX_NET_DEVICES": namespace.device(DATA)})

    def spawn_store(self, *, port: int = 0) -> Process:
        """Starts it there."""
        return spawn(
            "kvstore",
            *(*self._store_flags, "--port", str(port), "--host", self._namespace.host),
            env={"UCX_NET_DEVICES": f"{DATA}-in"},
            prefix=(*self._namespace.prefix, "unshare", "--pid", "--fork", "--kill-child"),
        )


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """Skips where namespaces cannot be made."""
    try:
        made = Namespace()
    except OSError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def _tokens(mesh: Mesh) -> list[dict[int, list[int]]]:
    return [generate(mesh, greedy_request([*prompt], 12)).tokens for prompt in PROMPTS]


def _paths(mesh: Mesh) -> set[str]:
    workers = [*mesh.prefills, *mesh.decodes]
    return {mesh.status(worker.address).detail.rpartition(" ")[2] for worker in workers}


def test_either_path_gives_the_same_tokens_and_the_store_moves_them_where_it_should(
    tiny_model: Path,
) -> None:
    receiver = OtlpReceiver()
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.start(),
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
    }

    def num_bytes(direction: str) -> float:
        points = receiver.metric_points("kvmesh.kv.transfer.io")
        latest = {p.instance: p.value for p in points if p.attributes["direction"] == direction}
        return sum(latest.values())

    try:
        with running_mesh(tiny_model, worker_flags=("--kv-path", "read"), env=env) as mesh:
            assert _paths(mesh) == {"(read)"}
            expected = _tokens(mesh)
            receiver.wait_until(lambda: num_bytes("get") > 0, 20)
        assert num_bytes("fetch") == 0
        got_by_read = num_bytes("get")
        with running_mesh(tiny_model, worker_flags=("--kv-path", "write"), env=env) as mesh:
            assert _paths(mesh) == {"(write)"}
            assert _tokens(mesh) == expected
            receiver.wait_until(lambda: num_bytes("fetch") == got_by_read, 20)
        assert num_bytes("get") == 2 * got_by_read
    finally:
        receiver.close()


def test_a_mesh_in_two_namespaces_lets_the_store_write(
    tiny_model: Path, namespace: Namespace
) -> None:
    with running_mesh(tiny_model) as mesh:
        assert _paths(mesh) == {"(read)"}
        expected = _tokens(mesh)
    apart = ApartMesh(tiny_model, namespace)
    try:
        apart.wait_until(lambda: _paths(apart) == {"(write)"}, "the store is up")
        assert _tokens(apart) == expected
        again = generate(apart, greedy_request([*PROMPTS[0]], 12))
        assert again.usage is not None and again.usage.num_cached_tokens >= 192
    finally:
        apart.close()
