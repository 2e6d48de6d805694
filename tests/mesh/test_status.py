"""StatusService answers from its callback; rates forget what is old."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from mesh.channel import open_channel
from mesh.server import ServiceServer
from mesh.status import Rate, StatusServicer
from mesh.telemetry import Telemetry
from protos import status_pb2, status_pb2_grpc


def one() -> status_pb2.InstanceStatus:
    return status_pb2.InstanceStatus(role=status_pb2.ROLE_DECODE, incarnation="a")


async def later() -> list[status_pb2.InstanceStatus]:
    return [one(), status_pb2.InstanceStatus(incarnation="b")]


async def later_one() -> status_pb2.InstanceStatus:
    return one()


@pytest.mark.parametrize(
    ("snapshot", "expected"), [(one, ["a"]), (lambda: [one()], ["a"]), (later, ["a", "b"])]
)
async def test_status_comes_from_the_callback(snapshot: Any, expected: list[str]) -> None:
    response = await StatusServicer(snapshot).GetStatus(status_pb2.GetStatusRequest(), None)
    assert [instance.incarnation for instance in response.instances] == expected


async def test_status_is_served_over_grpc() -> None:
    telemetry = Telemetry.off()
    server = ServiceServer(host="127.0.0.1", port=0, telemetry=telemetry)
    register = status_pb2_grpc.add_StatusServiceServicer_to_server
    server.add(register, StatusServicer(later_one), "kvmesh.v1.StatusService")
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)  # pyright: ignore[reportArgumentType]
        response = await stub.GetStatus(status_pb2.GetStatusRequest())
        with pytest.raises(grpc.aio.AioRpcError) as unchecked:
            await stub.CheckBooks(status_pb2.CheckBooksRequest())
    await server.stop(0)
    assert response.instances[0].role == status_pb2.ROLE_DECODE
    assert unchecked.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_books_that_do_not_balance_are_reported() -> None:
    def check() -> None:
        if problem:
            raise AssertionError(problem)

    servicer, request = StatusServicer(one, check), status_pb2.CheckBooksRequest()
    problem = ""
    assert (await servicer.CheckBooks(request, None)).failure == ""
    problem = "block 3 is free twice"
    assert (await servicer.CheckBooks(request, None)).failure == problem


def test_a_rate_counts_the_last_five_seconds() -> None:
    now = 100.0
    rate = Rate(lambda: now)
    assert rate.per_s() == 0.0
    rate.add(10)
    now = 103.0
    rate.add(5)
    assert rate.per_s() == 3.0
    now = 105.5
    assert rate.per_s() == 1.0
    now = 200.0
    assert rate.per_s() == 0.0
