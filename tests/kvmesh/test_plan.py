"""What `kvmesh up` decides before it starts anything."""

from __future__ import annotations

import dataclasses
import errno
import socket
from pathlib import Path

import pytest

from kvmesh import options
from kvmesh.options import MeshOptions, PlanError
from kvmesh.plan import MeshPlan, connectable, plan_mesh, threads_per_worker
from services.worker_settings import WorkerSettings

FILES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def test_an_admin_port_of_0_is_any_free_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picked = iter([50100, 50100, 50200])
    monkeypatch.setattr("kvmesh.ports._pick", lambda host: next(picked))
    plan = plan_mesh(MeshOptions(model=model, port=0, admin_port=0))
    assert plan.gateway.address == "127.0.0.1:50100"
    assert plan.admin_address == "127.0.0.1:50200"


def test_the_free_port_is_not_the_admin_port(
    model: Path, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    picked = iter([free_port, 50200])
    monkeypatch.setattr("kvmesh.ports._pick", lambda host: next(picked))
    plan = plan_mesh(MeshOptions(model=model, port=0, admin_port=free_port))
    assert plan.gateway.address == "127.0.0.1:50200"
    assert plan.admin_address == f"127.0.0.1:{free_port}"


def test_the_live_page_has_the_port_after_the_admin_port(model: Path) -> None:
    plan = plan_mesh(MeshOptions(model=model, port=0))
    public = int(plan.gateway.address.rpartition(":")[2])
    assert plan.http_address == f"127.0.0.1:{public + 2}"
    assert flag(plan.gateway.flags, "--http-port") == str(public + 2)


def test_a_port_of_0_has_free_ports_beside_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picked = iter([50100, 65534, 50200])
    monkeypatch.setattr("kvmesh.ports._pick", lambda host: next(picked))
    monkeypatch.setattr("kvmesh.ports._is_free", lambda flag, host, port: port != 50102)
    plan = plan_mesh(MeshOptions(model=model, port=0))
    addresses = (plan.gateway.address, plan.admin_address, plan.http_address)
    assert addresses == ("127.0.0.1:50200", "127.0.0.1:50201", "127.0.0.1:50202")


def test_the_admin_port_cannot_be_the_live_pages(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.ports._is_free", lambda flag, host, port: True)
    with pytest.raises(PlanError, match="--http-port 50053 is the --admin-port"):
        plan_mesh(MeshOptions(model=model, port=50051, admin_port=50053))


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
        ({"kv_bytes": "0"}, "--kv-bytes 0.*at least 1 byte"),
        ({"store_bytes": "9" * 400}, "--store-bytes: .999.*greatest size"),
        ({"store_disk_bytes": "much"}, "--store-disk-bytes.*much"),
        ({"store_disk": Path(__file__)}, "--store-disk .*test_plan.py: not a directory"),
        ({"store_host": "1GiB"}, "--store-host 1GiB: needs --device cuda"),
        ({"store_host": "much", "device": "cuda"}, "--store-host.*much"),
        ({"store_host": "999TiB", "device": "cuda"}, "--store-host 999TiB x 1.*this machine has"),
        ({"port": 70000}, "--port 70000: ports are 1 to 65535"),
        ({"port": -1}, "--port -1"),
        ({"admin_port": 70000}, "--admin-port 70000: ports are 1 to 65535"),
        ({"port": 65535}, "--port 65535.*--admin-port"),
        ({"port": 65534}, "--port 65534: --http-port would be 65536; give --http-port"),
        ({"http_port": 70000}, "--http-port 70000: ports are 1 to 65535"),
        ({"max_batch": 0}, "--max-batch 0.*at least 1"),
        ({"chunk_tokens": 15}, "--chunk-tokens 15.*at least 16"),
        ({"block_tokens": -3}, "--block-tokens -3: give 8 to 256"),
        ({"block_tokens": 257}, "--block-tokens 257: give 8 to 256"),
        ({"drain_s": -1.0}, "--drain-s -1.0.*at least 0"),
        ({"drain_s": float("nan")}, "--drain-s nan.*at least 0"),
        ({"drain_s": float("inf")}, "--drain-s inf"),
    ],
)
def test_bad_options_are_named(model: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_mesh(MeshOptions(model=model, **{"port": 0, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["9.9.9.9", "no-such-host.invalid", "::1"])
@pytest.mark.parametrize("port", [0, 50051])
def test_a_host_of_another_machine_is_named(model: Path, host: str, port: int) -> None:
    with pytest.raises(PlanError, match=f"--host {host} is not .* this machine"):
        plan_mesh(MeshOptions(model=model, host=host, port=port))


def test_a_port_that_may_not_be_opened_is_not_called_taken(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(_: socket.socket, address: tuple[str, int]) -> None:
        if address[1]:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("socket.socket.bind", bind)
    with pytest.raises(PlanError, match=r"--port 80 cannot be opened.*Permission denied"):
        plan_mesh(MeshOptions(model=model, port=80))


def test_one_port_cannot_be_both(model: Path, free_port: int) -> None:
    with pytest.raises(PlanError, match=f"--admin-port {free_port} is the --port"):
        plan_mesh(MeshOptions(model=model, port=free_port, admin_port=free_port))


def test_memory_beyond_the_machines_is_named_with_its_sum(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.options.memory_num_bytes", lambda: 8 * 2**30)
    fits = MeshOptions(model=model, port=0, num_decode=2, kv_bytes="2GiB", store_bytes="2GiB")
    plan_mesh(fits)
    with pytest.raises(PlanError) as caught:
        plan_mesh(dataclasses.replace(fits, num_kvstore=2))
    assert str(caught.value) == (
        "--kv-bytes 2GiB x 3 (workers) + --store-bytes 2GiB x 2 (kvstores) = "
        f"{10 * 2**30} bytes; this machine has {8 * 2**30} bytes of memory"
    )
    plan_mesh(dataclasses.replace(fits, num_kvstore=2, device="cuda"))


def test_the_limits_are_the_services_own() -> None:
    ours = {
        "block_tokens": (options.MIN_BLOCK_TOKENS, options.MAX_BLOCK_TOKENS),
        "max_batch": (options.MIN_BATCH, None),
        "chunk_tokens": (options.MIN_CHUNK_TOKENS, None),
        "drain_s": (options.MIN_DRAIN_S, None),
    }
    fields = {field.name: field.metadata for field in dataclasses.fields(WorkerSettings)}
    theirs = {name: (fields[name]["minimum"], fields[name]["maximum"]) for name in ours}
    assert ours == theirs


def test_sizes_of_the_workers_reach_them_and_defaults_stay_theirs(model: Path) -> None:
    given = plan_mesh(MeshOptions(model=model, port=0, block_tokens=16, max_batch=1))
    for spec in given.workers:
        assert flag(spec.flags, "--block-tokens") == "16"
        assert flag(spec.flags, "--max-batch") == "1"
        assert "--chunk-tokens" not in spec.flags


def test_every_store_gets_a_directory_of_its_own(model: Path) -> None:
    plan = plan_mesh(MeshOptions(model=model, port=0, num_kvstore=2, store_disk=Path("/d")))
    assert [flag(spec.flags, "--disk-dir") for spec in plan.kvstores] == [
        "/d/kvstore-0",
        "/d/kvstore-1",
    ]
    assert all(flag(spec.flags, "--disk-bytes") == "1GiB" for spec in plan.kvstores)
    assert all("--disk-dir" not in spec.flags for spec in wide(model).kvstores)


def test_stores_on_a_gpu_get_host_memory_and_a_disk(model: Path) -> None:
    options = MeshOptions(
        model=model, port=0, device="cuda", store_host="1MiB", store_disk=Path("/d")
    )
    (store,) = plan_mesh(options).kvstores
    assert flag(store.flags, "--host-bytes") == "1MiB"
    assert flag(store.flags, "--disk-dir") == "/d/kvstore-0"
    assert all("--host-bytes" not in spec.flags for spec in wide(model).kvstores)


def test_the_load_format_reaches_every_worker_and_no_other(model: Path) -> None:
    plan = plan_mesh(MeshOptions(model=model, port=0, load_format="dummy"))
    assert [flag(spec.flags, "--load-format") for spec in plan.workers] == ["dummy"] * 2
    assert all("--load-format" not in spec.flags for spec in (plan.gateway, *plan.kvstores))


def test_the_path_of_blocks_reaches_every_worker(model: Path) -> None:
    plan = plan_mesh(MeshOptions(model=model, port=0, kv_path="write"))
    assert [flag(spec.flags, "--kv-path") for spec in plan.workers] == ["write"] * 2


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nothing: no config\.json"):
        plan_mesh(MeshOptions(model=tmp_path / "nothing"))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_missing_tokenizer_is_named_before_anything_starts(model: Path, load_format: str) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match=r"no tokenizer\.json.* gateway .*--load-format dummy too"):
        plan_mesh(MeshOptions(model=model, port=0, load_format=load_format))


def test_only_random_weights_need_no_file_of_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    plan_mesh(MeshOptions(model=model, port=0, load_format="dummy"))
    with pytest.raises(PlanError, match=r"no \*\.safetensors there; .*--load-format dummy"):
        plan_mesh(MeshOptions(model=model, port=0))


def test_a_wildcard_host_is_dialled_on_loopback() -> None:
    assert connectable("0.0.0.0:50051") == "127.0.0.1:50051"
    assert connectable("10.0.0.7:50051") == "10.0.0.7:50051"


def test_every_process_gets_a_metrics_port_of_its_own(model: Path) -> None:
    plan = plan_mesh(MeshOptions(model=model, port=0, num_decode=2, metrics_port=9464))
    specs = [plan.gateway, *plan.kvstores, *plan.workers]
    ports = [flag(spec.flags, "--metrics-port") for spec in specs]
    assert ports == ["9464", "9465", "9466", "9467", "9468"]
    assert plan.stages == (plan.kvstores, plan.workers, (plan.gateway,))
    bare = plan_mesh(MeshOptions(model=model, port=0))
    assert all("--metrics-port" not in spec.flags for stage in bare.stages for spec in stage)


@pytest.mark.parametrize("port", [0, -1, 65533, 70000])
def test_a_metrics_port_leaves_room_for_the_others(model: Path, port: int) -> None:
    with pytest.raises(PlanError, match=f"--metrics-port {port}: give 1 to 65532"):
        plan_mesh(MeshOptions(model=model, port=0, metrics_port=port))
