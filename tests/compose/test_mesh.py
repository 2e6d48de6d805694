"""The mesh of compose.yaml in real containers: reached from outside, confined, and hard to stop."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import grpc
import pytest

from protos import common_pb2, gateway_pb2_grpc, status_pb2, status_pb2_grpc
from tests.compose.engine import docker
from tests.compose.project import SERVICES, Project
from tests.support.generate import Answer, greedy_request

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


def busy_rank(ports: dict[str, int]) -> str:
    """The decode service that has a request now."""
    with grpc.insecure_channel(f"127.0.0.1:{ports['KVMESH_ADMIN_PORT']}") as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        instances = stub.GetStatus(status_pb2.GetStatusRequest(), timeout=TIMEOUT_S).instances
    decodes = [i for i in instances if i.role == status_pb2.ROLE_DECODE and i.counts.num_requests]
    assert len(decodes) == 1, instances
    return decodes[0].address.partition(":")[0]


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
