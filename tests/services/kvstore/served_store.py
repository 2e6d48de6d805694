"""A store served over real gRPC with a transfer that only has a name; and requests to it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import cast

import grpc
import pytest

from kv.transfer import Agent, Transfer
from mesh.errors import KvmeshError, from_rpc_error
from mesh.server import ServiceServer
from protos import kvstore_pb2 as pb
from protos import kvstore_pb2_grpc
from services.kvstore.arena import SlotAllocator
from services.kvstore.callers import CallerTable
from services.kvstore.index import BlockIndex
from services.kvstore.servicer import KvStoreServicer
from tests.support.meters import Meters

SIZE = 4096
ARENA = 16 * SIZE
KEY_A, KEY_B = b"a" * 32, b"b" * 32
LIFE = "kvstore-test"


class NamedTransfer:
    """Stands for NIXL: as nobody fetches, the store only asks who it is."""

    agent = Agent(
        name=LIFE,
        nixl_version="1.5.1",
        metadata=b"meta",
        arena_address=4096,
        arena_num_bytes=ARENA,
        incarnation="store",
        host_id="here",
    )


@dataclass
class Service:
    """A served store, its stub, and its clock."""

    stub: kvstore_pb2_grpc.KvStoreServiceStub
    servicer: KvStoreServicer
    index: BlockIndex
    now: list[float]
    meters: Meters


@contextlib.asynccontextmanager
async def served_store() -> AsyncIterator[Service]:
    """A store for the length of a with block; its books are checked at the end."""
    now = [50.0]
    meters = Meters()
    telemetry = meters.telemetry
    index = BlockIndex(SlotAllocator(ARENA), clock=lambda: now[0])
    servicer = KvStoreServicer(
        index=index,
        callers=CallerTable(clock=lambda: now[0], idle_s=1000),
        transfer=cast(Transfer, NamedTransfer()),
        telemetry=telemetry,
    )
    server = ServiceServer(host="127.0.0.1", port=0, telemetry=telemetry)
    register = kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server
    server.add(register, servicer, "kvmesh.v1.KvStoreService")
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        yield Service(stub, servicer, index, now, meters)
    await server.stop(0)
    index.check()


async def connect(service: Service, version: str = "1.5.1") -> pb.ConnectResponse:
    agent = pb.Agent(name="decode-1", nixl_version=version, incarnation="w")
    return await service.stub.Connect(pb.ConnectRequest(agent=agent))


async def failure(call: grpc.aio.UnaryUnaryCall) -> KvmeshError:
    with pytest.raises(grpc.RpcError) as raised:
        await call
    return from_rpc_error(raised.value)


def reserve_request(**fields: object) -> pb.ReserveRequest:
    values = {"incarnation": "w", "keys": [KEY_A, KEY_B], "num_bytes": SIZE, "ttl_s": 30.0}
    return pb.ReserveRequest(**{**values, **fields})


def lookup_request(**fields: object) -> pb.LookupRequest:
    values = {"incarnation": "w", "keys": [KEY_A, KEY_B], "num_bytes": SIZE, "ttl_s": 30.0}
    return pb.LookupRequest(**{**values, **fields})


def seal_request(ids: list[int], digests: list[int]) -> pb.SealRequest:
    return pb.SealRequest(incarnation="w", reservation_ids=ids, digests=digests, life=LIFE)


def acknowledge_request(*ids: int) -> pb.AcknowledgeRequest:
    return pb.AcknowledgeRequest(incarnation="w", reservation_ids=ids, life=LIFE)


async def put(service: Service, **fields: object) -> list[int]:
    response = await service.stub.Reserve(reserve_request(**fields))
    ids = [reservation.reservation_id for reservation in response.reservations]
    digests = [2**64 - 1 - i for i in range(len(ids))]
    request = seal_request(ids, digests)
    assert all((await service.stub.Seal(request)).sealed)
    return ids
