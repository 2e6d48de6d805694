"""KvStoreService over real gRPC with a transfer that only has a name."""

from __future__ import annotations

import grpc
import pytest

from protos import kvstore_pb2 as pb
from services.kvstore.tenants import tenant_number
from tests.services.kvstore.served_store import (
    ARENA,
    KEY_A,
    KEY_B,
    LIFE,
    SIZE,
    Service,
    acknowledge_request,
    connect,
    failure,
    lookup_request,
    put,
    reserve_request,
    seal_request,
)


async def test_connect_answers_with_the_stores_agent(service: Service) -> None:
    agent = (await connect(service)).agent
    assert (agent.name, agent.metadata, agent.arena_address) == ("kvstore-test", b"meta", 4096)
    assert (agent.arena_num_bytes, agent.incarnation, agent.host_id) == (ARENA, "store", "here")


async def test_another_nixl_version_is_refused(service: Service) -> None:
    agent = pb.Agent(name="decode-1", nixl_version="1.0.0", incarnation="w")
    error = await failure(service.stub.Connect(pb.ConnectRequest(agent=agent)))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == "NIXL_VERSION_MISMATCH" and "1.0.0" in str(error)
    assert (await failure(service.stub.Reserve(reserve_request()))).reason == "UNKNOWN_INCARNATION"


async def test_the_whole_protocol(service: Service) -> None:
    await connect(service)
    response = await service.stub.Reserve(reserve_request())
    first, second = response.reservations
    assert first.outcome == pb.Reservation.OUTCOME_RESERVED
    assert (first.slot.num_bytes, second.slot.offset) == (SIZE, first.slot.offset + SIZE)
    assert (await service.stub.Lookup(lookup_request())).lease_id == 0
    ids = [first.reservation_id, second.reservation_id]
    seal = seal_request(ids, [2**64 - 1, 7])
    assert list((await service.stub.Seal(seal)).sealed) == [True, True]
    leased = await service.stub.Lookup(lookup_request())
    assert list(leased.digests) == [2**64 - 1, 7] and leased.num_bytes == SIZE
    assert list(leased.offsets) == [first.slot.offset, second.slot.offset]
    release = pb.ReleaseRequest(incarnation="w", lease_id=leased.lease_id, life=LIFE)
    held, expired = pb.ReleaseResponse.OUTCOME_HELD, pb.ReleaseResponse.OUTCOME_EXPIRED
    assert (await service.stub.Release(release)).outcome == held
    assert (await service.stub.Release(release)).outcome == expired


async def test_lookups_for_reuse_are_counted_and_hand_overs_are_not(service: Service) -> None:
    await connect(service)
    await put(service, keys=[KEY_A])
    await service.stub.Lookup(lookup_request())
    await service.stub.Lookup(lookup_request(waits_for_writers=True))
    totals = service.meters.totals("kvmesh.kv.lookup.blocks")
    assert totals == {("memory",): 1, ("below",): 0, ("miss",): 1}


async def test_an_expired_lease_and_reservation(service: Service) -> None:
    await connect(service)
    await put(service, keys=[KEY_A])
    leased = await service.stub.Lookup(lookup_request(ttl_s=1.0))
    (late,) = (await service.stub.Reserve(reserve_request(keys=[KEY_B], ttl_s=1.0))).reservations
    service.now[0] += 2
    release = pb.ReleaseRequest(incarnation="w", lease_id=leased.lease_id, life=LIFE)
    outcome = (await service.stub.Release(release)).outcome
    assert outcome == pb.ReleaseResponse.OUTCOME_EXPIRED
    ids = [late.reservation_id]
    seal = seal_request(ids, [1])
    assert list((await service.stub.Seal(seal)).sealed) == [False]
    acknowledge = acknowledge_request(*ids)
    assert (await service.stub.Acknowledge(acknowledge)).num_freed == 1


async def test_corrupt_keys_are_dropped_without_a_lease(service: Service) -> None:
    await connect(service)
    await put(service)
    await service.stub.Release(pb.ReleaseRequest(incarnation="w", corrupt_keys=[KEY_A]))
    assert (await service.stub.Lookup(lookup_request())).lease_id == 0
    assert service.index.counts().num_sealed == 1


async def test_discard_drops_a_private_block(service: Service) -> None:
    await connect(service)
    await put(service, keys=[KEY_A], is_private=True)
    assert (await service.stub.Discard(pb.DiscardRequest(keys=[KEY_A]))).num_dropped == 1


async def test_pins_over_the_wire(service: Service) -> None:
    await connect(service)
    await put(service)
    pin = pb.PinRequest(incarnation="w", keys=[KEY_A, KEY_B, b"c" * 32], ttl_s=5.0)
    pinned = await service.stub.Pin(pin)
    assert pinned.num_pinned == 2 and pinned.pin_id
    assert service.index.evict(2) == 0
    other = pb.UnpinRequest(incarnation="x", pin_id=pinned.pin_id)
    assert not (await service.stub.Unpin(other)).unpinned
    unpin = pb.UnpinRequest(incarnation="w", pin_id=pinned.pin_id)
    assert (await service.stub.Unpin(unpin)).unpinned
    assert not (await service.stub.Unpin(unpin)).unpinned
    service.servicer.drain()
    assert (await failure(service.stub.Pin(pin))).reason == "DRAINING"


async def test_a_tenant_is_counted_by_its_name(service: Service) -> None:
    await connect(service)
    await put(service, tenant="t" * 64)
    assert service.index._memory.tenants.num_bytes == {tenant_number("t" * 64): 2 * SIZE}


async def test_a_full_store_says_so(service: Service) -> None:
    await connect(service)
    keys = [bytes([i]) * 32 for i in range(17)]
    response = await service.stub.Reserve(reserve_request(keys=keys))
    assert response.reservations[15].outcome == pb.Reservation.OUTCOME_RESERVED
    assert response.reservations[16].outcome == pb.Reservation.OUTCOME_FULL
    assert not response.reservations[16].HasField("slot")


async def test_unknown_incarnations_must_connect(service: Service) -> None:
    seal = pb.SealRequest(incarnation="w")
    stub = service.stub
    calls = (stub.Reserve(reserve_request()), stub.Seal(seal), stub.Lookup(lookup_request()))
    for call in (*calls, stub.Pin(pb.PinRequest(ttl_s=1))):
        error = await failure(call)
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert error.reason == "UNKNOWN_INCARNATION"


async def test_a_draining_store_refuses_new_work_but_releases(service: Service) -> None:
    await connect(service)
    await put(service)
    leased = await service.stub.Lookup(lookup_request())
    service.servicer.drain()
    error = await failure(service.stub.Lookup(lookup_request()))
    assert error.code is grpc.StatusCode.UNAVAILABLE and error.reason == "DRAINING"
    release = pb.ReleaseRequest(incarnation="w", lease_id=leased.lease_id, life=LIFE)
    outcome = (await service.stub.Release(release)).outcome
    assert outcome == pb.ReleaseResponse.OUTCOME_HELD


BAD_REQUESTS = [
    ("Connect", pb.ConnectRequest(agent=pb.Agent(incarnation="w")), "agent.name", "empty"),
    ("Connect", pb.ConnectRequest(agent=pb.Agent(name="n")), "agent.incarnation", "empty"),
    ("Reserve", reserve_request(keys=[KEY_A, b"short"]), "keys[1]", "5 bytes"),
    ("Reserve", reserve_request(keys=[KEY_A] * 4097), "keys", "4096"),
    ("Reserve", reserve_request(num_bytes=0), "num_bytes", "0;"),
    ("Reserve", reserve_request(num_bytes=ARENA + 1), "num_bytes", str(ARENA)),
    ("Reserve", reserve_request(ttl_s=0.0), "ttl_s", "300"),
    ("Reserve", reserve_request(ttl_s=float("nan")), "ttl_s", "nan"),
    ("Reserve", reserve_request(tenant="t" * 65), "tenant", "65 bytes; the limit is 64"),
    ("Pin", pb.PinRequest(keys=[KEY_A, b"x"], ttl_s=1.0), "keys[1]", "1 bytes"),
    ("Pin", pb.PinRequest(keys=[KEY_A] * 4097, ttl_s=1.0), "keys", "4096"),
    ("Pin", pb.PinRequest(keys=[KEY_A]), "ttl_s", "300"),
    ("Pin", pb.PinRequest(keys=[KEY_A], ttl_s=301.0), "ttl_s", "301"),
    ("Lookup", lookup_request(keys=[b""]), "keys[0]", "0 bytes"),
    ("Lookup", lookup_request(num_bytes=0), "num_bytes", "0;"),
    ("Lookup", lookup_request(ttl_s=300.5), "ttl_s", "300.5"),
    ("Lookup", lookup_request(max_wait_s=-1.0), "max_wait_s", "-1"),
    ("Lookup", lookup_request(max_wait_s=float("nan")), "max_wait_s", "nan"),
    ("Lookup", lookup_request(max_wait_s=61.0), "max_wait_s", "0 to 60"),
    ("Seal", pb.SealRequest(reservation_ids=[1, 2], digests=[3]), "digests", "1 values"),
    ("Seal", pb.SealRequest(reservation_ids=[1] * 4097), "reservation_ids", "4096"),
    ("Seal", pb.SealRequest(incarnation="w"), "life", "empty"),
    ("Acknowledge", pb.AcknowledgeRequest(reservation_ids=[1] * 4097), "reservation_ids", "4097"),
    ("Acknowledge", pb.AcknowledgeRequest(attempts=[1] * 4097), "attempts", "limit is 4096"),
    ("Acknowledge", pb.AcknowledgeRequest(reservation_ids=[1]), "life", "empty"),
    ("Release", pb.ReleaseRequest(lease_id=1), "life", "empty"),
    ("Release", pb.ReleaseRequest(corrupt_keys=[b"x"]), "corrupt_keys[0]", "1 bytes"),
    ("Discard", pb.DiscardRequest(keys=[b"x"]), "keys[0]", "1 bytes"),
]


@pytest.mark.parametrize(("method", "request_", "field", "text"), BAD_REQUESTS)
async def test_bad_fields_are_named(
    service: Service, method: str, request_: object, field: str, text: str
) -> None:
    await connect(service)
    error = await failure(getattr(service.stub, method)(request_))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in error.violations] == [field]
    assert text in error.violations[0].description
