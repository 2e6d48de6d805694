"""What `kvmesh up` decides before it starts anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kvmesh.plan import (
    MeshOptions,
    MeshPlan,
    PlanError,
    connectable,
    plan_mesh,
    threads_per_worker,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def flag(flags: tuple[str, ...], name: str) -> str:
    return flags[flags.index(name) + 1]


def wide(model: Path) -> MeshPlan:
    return plan_mesh(MeshOptions(model=model, port=0, num_prefill=2, num_decode=3, num_kvstore=2))


def test_every_service_gets_its_own_port(model: Path) -> None:
    plan = wide(model)
    addresses = [spec.address for stage in plan.stages for spec in stage]
    assert len(set(addresses)) == len(addresses) == 8
    assert plan.admin_address not in addresses


def test_the_gateway_knows_everyone_and_workers_know_the_stores(model: Path) -> None:
    plan = wide(model)
    stores = ",".join(spec.address for spec in plan.kvstores)
    flags = plan.gateway.flags
    decodes = ",".join(spec.address for spec in plan.workers if spec.role == "decode")
    assert flag(flags, "--decode") == decodes
    assert flag(flags, "--kvstore") == stores
    assert all(flag(spec.flags, "--kvstore") == stores for spec in plan.workers)


def test_services_end_with_the_launcher(model: Path) -> None:
    assert all("--die-with-parent" in spec.flags for stage in wide(model).stages for spec in stage)


def test_cores_are_shared_out_and_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert [threads_per_worker(n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]


def test_the_admin_port_is_the_next_one(model: Path) -> None:
    plan = plan_mesh(MeshOptions(model=model, port=0))
    public = int(plan.gateway.address.rpartition(":")[2])
    assert plan.admin_address == f"127.0.0.1:{public + 1}"
    assert flag(plan.gateway.flags, "--admin-port") == str(public + 1)


def test_a_taken_port_is_named(model: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PlanError, match=f"--port {port} is taken"):
            plan_mesh(MeshOptions(model=model, port=port))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_decode": 0}, "--decode 0"),
        ({"kv_bytes": "lots"}, "--kv-bytes.*lots"),
        ({"port": 70000}, "--port 70000"),
    ],
)
def test_bad_options_are_named(model: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_mesh(MeshOptions(model=model, **changes))  # type: ignore[arg-type]


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no config\.json"):
        plan_mesh(MeshOptions(model=tmp_path / "nothing"))


def test_a_wildcard_host_is_dialled_on_loopback() -> None:
    assert connectable("0.0.0.0:50051") == "127.0.0.1:50051"
    assert connectable("10.0.0.7:50051") == "10.0.0.7:50051"
