"""What was granted in an answer that never arrived, and ids of another life of the store."""

from __future__ import annotations

import asyncio

from protos import kvstore_pb2 as pb
from services.kvstore.attempts import GivenUp
from tests.services.kvstore.served_store import (
    KEY_A,
    KEY_B,
    Service,
    connect,
    lookup_request,
    put,
    reserve_request,
)


def give_back(*attempts: int, owner: str = "w") -> pb.AcknowledgeRequest:
    return pb.AcknowledgeRequest(incarnation=owner, attempts=attempts)


async def test_a_writer_gives_back_what_an_attempt_got(service: Service) -> None:
    await connect(service)
    stub = service.stub
    await stub.Reserve(reserve_request(keys=[KEY_A], attempt=5))
    await stub.Reserve(reserve_request(keys=[KEY_B], attempt=6))
    assert (await stub.Acknowledge(give_back(5, owner="another"))).num_freed == 0
    assert (await stub.Acknowledge(give_back(5, 7))).num_freed == 1
    assert (await stub.Acknowledge(give_back(5))).num_freed == 0
    assert service.index.counts().num_reserved == 1


async def test_a_slot_in_quarantine_is_given_back_too(service: Service) -> None:
    await connect(service)
    await service.stub.Reserve(reserve_request(keys=[KEY_A], ttl_s=1.0, attempt=5))
    service.now[0] += 2.0
    assert (await service.stub.Acknowledge(give_back(5))).num_freed == 1


async def test_a_reader_gives_back_the_lease_of_an_attempt(service: Service) -> None:
    await connect(service)
    stub = service.stub
    await put(service, keys=[KEY_A], is_private=True)
    await stub.Lookup(lookup_request(keys=[KEY_A], attempt=5))
    kept = await stub.Lookup(lookup_request(keys=[KEY_A], attempt=6))
    await stub.Acknowledge(give_back(5, owner="another"))
    assert service.index.counts().num_leases == 2
    assert (await stub.Acknowledge(give_back(5))).num_freed == 0
    counts = service.index.counts()
    assert (counts.num_leases, counts.num_dropped) == (1, 1), "private blocks go, as with Release"
    release = pb.ReleaseRequest(incarnation="w", lease_id=kept.lease_id, life="kvstore-test")
    assert (await stub.Release(release)).outcome == pb.ReleaseResponse.OUTCOME_HELD
    assert service.index.counts().num_dropped == 0


async def test_what_has_no_name_is_nobodys_to_give_up(service: Service) -> None:
    await connect(service)
    await put(service, keys=[KEY_A])
    await service.stub.Reserve(reserve_request(keys=[KEY_B]))
    await service.stub.Lookup(lookup_request(keys=[KEY_A]))
    await service.stub.Acknowledge(give_back(0))
    counts = service.index.counts()
    assert (counts.num_reserved, counts.num_leases) == (1, 1)
    assert (await service.stub.Lookup(lookup_request(keys=[KEY_A]))).lease_id


async def test_a_request_that_arrives_after_its_attempt_was_given_up_gets_nothing(
    service: Service,
) -> None:
    await connect(service)
    stub = service.stub
    await put(service, keys=[KEY_A])
    await stub.Acknowledge(give_back(5, 6))
    reserved = (await stub.Reserve(reserve_request(attempt=5))).reservations
    outcomes = pb.Reservation
    assert [r.outcome for r in reserved] == [
        outcomes.OUTCOME_ALREADY_SEALED,
        outcomes.OUTCOME_FULL,
    ]
    assert not (await stub.Lookup(lookup_request(attempt=6))).lease_id
    another = pb.Agent(name="decode-2", nixl_version="1.5.1", incarnation="another")
    await stub.Connect(pb.ConnectRequest(agent=another))
    others = await stub.Lookup(lookup_request(incarnation="another", attempt=6))
    assert others.lease_id, "attempts are each caller's own"


async def test_a_lookup_that_waits_while_it_is_given_up_gets_nothing(service: Service) -> None:
    await connect(service)
    stub = service.stub
    (answer,) = (await stub.Reserve(reserve_request(keys=[KEY_A]))).reservations
    waits = lookup_request(keys=[KEY_A], waits_for_writers=True, max_wait_s=30.0, attempt=5)
    reading = asyncio.ensure_future(stub.Lookup(waits, timeout=30))
    await asyncio.wait([reading], timeout=0.05)
    await stub.Acknowledge(give_back(5))
    assert not reading.done()
    assert service.index.seal("w", [answer.reservation_id], [7]) == [True]
    assert not (await reading).lease_id
    assert service.index.counts().num_leases == 0


def test_attempts_are_forgotten_when_nothing_can_arrive_any_more() -> None:
    given_up = GivenUp()
    given_up.add("w", [1, 2], 100.0)
    given_up.add("w", [3], 130.0)
    given_up.add("w", [1], 140.0)  # told again
    given_up.expire(159.0)
    assert len(given_up) == 3
    given_up.expire(160.0)
    assert [given_up.has("w", n) for n in (1, 2, 3)] == [True, False, True]
    given_up.expire(190.0)
    assert [given_up.has("w", n) for n in (1, 2, 3)] == [True, False, False]
    given_up.expire(200.0)
    assert len(given_up) == 0


async def test_ids_of_another_life_are_unknown(service: Service) -> None:
    await connect(service)
    stub = service.stub
    await put(service, keys=[KEY_A])
    leased = await stub.Lookup(lookup_request(keys=[KEY_A]))
    (open_,) = (await stub.Reserve(reserve_request(keys=[KEY_B]))).reservations
    old, ids = "kvstore-before", [open_.reservation_id]
    seal = pb.SealRequest(incarnation="w", reservation_ids=ids, digests=[7], life=old)
    assert list((await stub.Seal(seal)).sealed) == [False]
    acknowledge = pb.AcknowledgeRequest(incarnation="w", reservation_ids=ids, life=old)
    assert (await stub.Acknowledge(acknowledge)).num_freed == 0
    release = pb.ReleaseRequest(incarnation="w", lease_id=leased.lease_id, life=old)
    assert (await stub.Release(release)).outcome == pb.ReleaseResponse.OUTCOME_EXPIRED
    counts = service.index.counts()
    assert (counts.num_reserved, counts.num_leases) == (1, 1)
