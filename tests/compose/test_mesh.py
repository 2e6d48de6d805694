"""The mesh of compose.yaml in real containers: reached from outside, confined, and hard to stop."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml

from protos import common_pb2, gateway_pb2_grpc, status_pb2, status_pb2_grpc
from tests.compose.engine import docker
from tests.compose.project import SCALE_UP, SERVICES, UP, Project
from tests.support.generate import Answer, greedy_request
from tests.support.mesh import ROOT

pytestmark = [pytest.mark.compose, pytest.mark.slow, pytest.mark.timeout(2400)]

MOVERS = ("prefill", "decode-0", "decode-1", "kvstore")
TIMEOUT_S = 120.0
NUM_TOKENS = 400
# A row of a table that UCX_PROTO_INFO prints: a range of sizes, how, and over what.
ROW = re.compile(r"\| +\d+\.\.\w+ +\|[^|]+\| +(\S+) +\|$")


@pytest.fixture
def generation(
    project: Project, ports: dict[str, int]
) -> Iterator[gateway_pb2_grpc.GenerationServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{ports['KVMESH_PORT']}") as channel:
        yield gateway_pb2_grpc.GenerationServiceStub(channel)


def generate(
    stub: gateway_pb2_grpc.GenerationServiceStub, prompt: list[int], num: int
) -> list[int]:
    answer = Answer()
    for response in stub.Generate(greedy_request(prompt, num), timeout=TIMEOUT_S):
        answer.add(response)
    return answer.tokens[0]


def instances(ports: dict[str, int], role: status_pb2.Role) -> list[status_pb2.InstanceStatus]:
    """What the gateway says of those with a role."""
    with grpc.insecure_channel(f"127.0.0.1:{ports['KVMESH_ADMIN_PORT']}") as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        answer = stub.GetStatus(status_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
    return [instance for instance in answer.instances if instance.role == role]


def busy_rank(ports: dict[str, int]) -> str:
    """The decode service that has a request now."""
    decodes = instances(ports, status_pb2.ROLE_DECODE)
    (busy,) = [instance for instance in decodes if instance.counts.num_requests]
    return busy.address.partition(":")[0]


def chosen_paths(log: str, direction: str) -> Iterator[str]:
    """What UCX says that it uses for blocks of every size."""
    is_ours = False
    for line in log.splitlines():
        if " by ucp_" in line:
            is_ours = f"remote memory {direction} by ucp_" in line and "(multi)" in line
        elif is_ours and (row := ROW.search(line)):
            yield row.group(1)


def crash(project: Project, service: str) -> None:
    """Kills a service's process as the kernel would, so that its restart policy holds."""
    pid = project.state(service)["Pid"]
    assert pid > 0, f"{service} does not run"  # 0 would be this process's own group
    os.kill(pid, signal.SIGKILL)


def wait_restarted(project: Project, service: str) -> None:
    while not project.state(service)["RestartCount"]:
        docker("inspect", project.container(service))
    project.wait_healthy(service)


def test_a_prompt_is_answered_from_outside_and_its_blocks_are_reused(
    project: Project, generation: gateway_pb2_grpc.GenerationServiceStub
) -> None:
    request = greedy_request(list(range(10, 310)), 20)
    answers = []
    for _ in range(2):
        answer = Answer()
        for response in generation.Generate(request, timeout=TIMEOUT_S):
            answer.add(response)
        answers.append(answer)
    assert len(answers[0].tokens[0]) == 20
    assert answers[0].tokens == answers[1].tokens
    assert answers[1].info is not None
    assert answers[1].info.num_cached_tokens >= 256


def test_the_live_page_and_its_events_reach_a_browser_outside(
    project: Project, ports: dict[str, int]
) -> None:
    """The gateway listens on all addresses there and is asked by one that it does not know."""
    url = f"http://127.0.0.1:{ports['KVMESH_HTTP_PORT']}"
    with urllib.request.urlopen(f"{url}/", timeout=TIMEOUT_S) as page:
        assert "<title>kvmesh</title>" in page.read().decode()
    with urllib.request.urlopen(f"{url}/events", timeout=TIMEOUT_S) as events:
        assert events.headers.get_content_type() == "text/event-stream"
        frame = json.loads(events.readline().removeprefix(b"data: "))
    assert len(frame["instances"]) == len(SERVICES)
    stranger = urllib.request.Request(f"{url}/events", headers={"Host": "kvmesh.example"})
    with pytest.raises(urllib.error.HTTPError, match="421"):
        urllib.request.urlopen(stranger, timeout=TIMEOUT_S)


def test_prometheus_finds_every_process_by_name(project: Project, tmp_path: Path) -> None:
    """promtool asks docker's DNS from within the network, as the observability profile would."""
    if shutil.which("promtool") is None:
        pytest.skip("PROMETHEUS' DISCOVERY NOT TESTED: promtool is not installed")
    pid = project.state("gateway")["Pid"]
    resolver, config = tmp_path / "resolv.conf", tmp_path / "prometheus.yml"
    shutil.copy(f"/proc/{pid}/root/etc/resolv.conf", resolver)
    text = (ROOT / "deploy" / "observability" / "prometheus.yaml").read_text()
    config.write_text(yaml.safe_dump(yaml.safe_load(text) | {"rule_files": []}))
    check = f"promtool check service-discovery {config} kvmesh --timeout 10s"
    command = f"mount --bind {resolver} /etc/resolv.conf && nsenter --target {pid} --net {check}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, check=True
    )
    instances = {target["labels"]["instance"].split()[0] for target in json.loads(done.stdout)}
    assert instances == set(SERVICES)


def test_blocks_travel_by_cma_and_not_over_tcp(
    project: Project, generation: gateway_pb2_grpc.GenerationServiceStub
) -> None:
    generate(generation, list(range(1000, 1300)), 4)
    assert set(chosen_paths(project.logs("prefill"), "write")) == {"cma/memory"}
    logs = project.logs("decode-0") + project.logs("decode-1")
    assert set(chosen_paths(logs, "read")) == {"cma/memory"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_confined(project: Project, service: str) -> None:
    program = (
        "import os, pathlib; status = pathlib.Path('/proc/self/status').read_text()\n"
        "assert os.getuid() == 10001 and os.getgid() == 10001, os.getuid()\n"
        "assert 'CapEff:\\t0000000000000000' in status and 'NoNewPrivs:\\t1' in status, status\n"
        "for place in ('/opt/kvmesh', '/models', '/', '/tmp'):\n"
        "    try:\n"
        "        (pathlib.Path(place) / 'probe').write_text('')\n"
        "        print(place)\n"
        "    except OSError:\n"
        "        pass\n"
    )
    done = project.execute(service, "python", "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["/tmp"]


@pytest.mark.parametrize("service", ["gateway", "kvstore"])
def test_a_small_image_has_no_torch(project: Project, service: str) -> None:
    for name in ("torch", "triton"):
        done = project.execute(service, "python", "-c", f"import {name}")
        assert "ModuleNotFoundError" in done.stderr


def test_a_stream_outlives_the_container_that_feeds_it(
    project: Project,
    generation: gateway_pb2_grpc.GenerationServiceStub,
    ports: dict[str, int],
) -> None:
    prompt = list(range(2000, 2100))
    undisturbed = generate(generation, prompt, NUM_TOKENS)
    answer = Answer()
    killed = ""
    for response in generation.Generate(greedy_request(prompt, NUM_TOKENS), timeout=TIMEOUT_S):
        answer.add(response)
        if not killed and len(answer.tokens.get(0, ())) >= NUM_TOKENS // 10:
            killed = busy_rank(ports)
            crash(project, killed)
    assert killed
    assert answer.tokens[0] == undisturbed
    assert answer.finished[0].reason == common_pb2.FINISH_REASON_LENGTH
    wait_restarted(project, killed)


def test_the_mesh_outlives_its_kvstore(
    project: Project, generation: gateway_pb2_grpc.GenerationServiceStub
) -> None:
    """Workers share the store's namespaces through another container: its end is not theirs."""
    prompt = list(range(3000, 3200))
    undisturbed = generate(generation, prompt, 40)
    pids = {service: project.state(service)["Pid"] for service in MOVERS}
    crash(project, "kvstore")
    assert generate(generation, prompt, 40) == undisturbed
    wait_restarted(project, "kvstore")
    assert generate(generation, prompt, 40) == undisturbed
    workers = [service for service in MOVERS if service != "kvstore"]
    assert [project.state(service)["Pid"] for service in workers] == [pids[w] for w in workers]


def test_a_store_more_is_taken_in_and_let_go(
    project: Project,
    generation: gateway_pb2_grpc.GenerationServiceStub,
    ports: dict[str, int],
) -> None:
    """Docker's DNS gives every address of a service that is scaled; all processes follow it."""
    prompt = list(range(1500, 1800))
    undisturbed = generate(generation, prompt, 20)
    project.up(SCALE_UP)
    deadline = time.monotonic() + TIMEOUT_S
    for first in itertools.count(10):
        generate(generation, list(range(first, first + 300)), 4)
        stores = instances(ports, status_pb2.ROLE_KVSTORE)
        if len(stores) == 2 and all(store.counts.num_blocks_sealed for store in stores):
            break
        assert time.monotonic() < deadline, stores
    assert generate(generation, prompt, 20) == undisturbed
    project.up(UP)
    while len(stores := instances(ports, status_pb2.ROLE_KVSTORE)) != 1:
        assert time.monotonic() < deadline + TIMEOUT_S, stores
        threading.Event().wait(0.25)
    assert generate(generation, prompt, 20) == undisturbed


def test_it_stops_cleanly_and_leaves_nothing(project: Project) -> None:
    """Last in this file: it takes the mesh down."""
    project.compose("stop", timeout_s=TIMEOUT_S)
    assert {service: project.state(service)["ExitCode"] for service in SERVICES} == dict.fromkeys(
        SERVICES, 0
    )
    project.down()
    label = f"label=com.docker.compose.project={project.name}"
    for kind in (("ps", "--all"), ("network", "ls"), ("volume", "ls")):
        assert docker(*kind, "--quiet", "--filter", label) == ""
