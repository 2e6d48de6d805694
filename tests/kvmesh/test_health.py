"""`kvmesh health`, asked of a server whose states are set here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvmesh import cli

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def process() -> Iterator[tuple[str, health.HealthServicer]]:
    """An address, and what to set."""
    server, servicer = grpc.server(ThreadPoolExecutor(2)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(("health", *argv))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_process_that_is_alive_need_not_be_ready(
    process: tuple[str, health.HealthServicer], capsys: pytest.CaptureFixture[str]
) -> None:
    address, servicer = process
    servicer.set("liveness", SERVING)
    servicer.set("readiness", NOT_SERVING)
    assert run("--addr", address) == 1
    assert run("--addr", address, "--service", "liveness") == 0
    servicer.set("readiness", SERVING)
    assert run("--addr", address) == 0
    assert capsys.readouterr().out.split() == ["NOT_SERVING", "SERVING", "SERVING"]


def test_a_process_that_does_not_answer_is_named(
    process: tuple[str, health.HealthServicer], capsys: pytest.CaptureFixture[str]
) -> None:
    address, _ = process
    assert run("--addr", "127.0.0.1:1") == 1
    assert "127.0.0.1:1: UNAVAILABLE" in capsys.readouterr().err
    assert run("--addr", address) == 1  # a process that does not know the name
    assert f"{address}: NOT_FOUND" in capsys.readouterr().err
