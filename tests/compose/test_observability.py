"""The observability profile's files agree with each other and with compose.yaml."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.mesh import ROOT

DEPLOY = ROOT / "deploy" / "observability"
PROVISIONING = ROOT / "dashboards" / "provisioning"
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MESH = {name for name, s in SERVICES.items() if "kvmesh/" in s["image"] and name != "namespace"}


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_prometheus_scrapes_every_process_at_the_port_that_it_serves() -> None:
    (job,) = load(DEPLOY / "prometheus.yaml")["scrape_configs"]
    (names,) = job["dns_sd_configs"]
    assert set(names["names"]) == MESH
    for service in MESH:
        assert SERVICES[service]["environment"]["OTEL_EXPORTER_PROMETHEUS_PORT"] == str(
            names["port"]
        )


def test_prometheus_takes_its_file(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("PROMETHEUS' FILE NOT CHECKED: promtool is not installed")
    config = tmp_path / "prometheus.yml"
    config.write_text((DEPLOY / "prometheus.yaml").read_text())
    (tmp_path / "kvmesh").symlink_to(ROOT / "dashboards")
    done = subprocess.run(
        ["promtool", "check", "config", str(config)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_tells_stores_of_one_name_apart(tmp_path: Path) -> None:
    """promtool relabels as Prometheus does; what DNS would answer is listed instead."""
    if shutil.which("promtool") is None:
        pytest.skip("PROMETHEUS' FILE NOT CHECKED: promtool is not installed")
    config = load(DEPLOY / "prometheus.yaml") | {"rule_files": []}
    (job,) = config["scrape_configs"]
    (names,) = job.pop("dns_sd_configs")
    job["static_configs"] = [
        {"targets": [f"10.0.{row}.{store}:9464"], "labels": {"__meta_dns_name": name}}
        for row, name in enumerate(names["names"])
        for store in range(1 + name.endswith("kvstore"))
    ]
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    command = ["promtool", "check", "service-discovery", str(path), "kvmesh", "--timeout", "2s"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    instances = [target["labels"]["instance"] for target in json.loads(done.stdout)]
    assert len(set(instances)) == len(instances) == len(names["names"]) + 2
    assert {name for name in names["names"] if not name.endswith("kvstore")} < set(instances)


def test_spans_reach_tempo_through_the_collector() -> None:
    collector, tempo = load(DEPLOY / "collector.yaml"), load(DEPLOY / "tempo.yaml")
    receiver = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    default = re.search(
        r"-http://([\w-]+):(\d+)\}",
        SERVICES["gateway"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"],
    )
    assert default is not None
    assert default.group(1) in SERVICES and receiver.endswith(f":{default.group(2)}")
    host, _, port = collector["exporters"]["otlp"]["endpoint"].partition(":")
    assert host in SERVICES
    assert tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(
        f":{port}"
    )
    pipeline = collector["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) <= set(collector[kind])


def test_grafana_opens_with_decode_steps_and_finds_its_sources() -> None:
    grafana = SERVICES["grafana"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    mounts = dict(volume.split(":")[1::-1] for volume in grafana["volumes"])
    folder = ROOT / mounts[str(home.parent)]
    assert (folder / home.name).is_file()
    (provider,) = load(PROVISIONING / "dashboards" / "kvmesh.yaml")["providers"]
    assert provider["options"]["path"] == str(home.parent)
    sources = load(PROVISIONING / "datasources" / "kvmesh.yaml")["datasources"]
    for source in sources:
        assert re.fullmatch(r"http://([\w-]+):\d+", source["url"]).group(1) in SERVICES  # pyright: ignore[reportOptionalMemberAccess]
    assert {source["uid"] for source in sources} == {"prometheus", "tempo"}
