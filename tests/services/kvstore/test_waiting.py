"""Readers that were promised blocks, and writers that end without having sealed them."""

from __future__ import annotations

import asyncio

import pytest

from protos import kvstore_pb2 as pb
from tests.services.kvstore.served_store import (
    KEY_A,
    KEY_B,
    Service,
    acknowledge_request,
    connect,
    lookup_request,
    put,
    reserve_request,
    seal_request,
)


async def test_a_reader_that_was_promised_blocks_waits_for_their_seal(service: Service) -> None:
    await connect(service)
    stub = service.stub
    reserved = await stub.Reserve(reserve_request(keys=[KEY_A, KEY_B]))
    numbers = [answer.reservation_id for answer in reserved.reservations]
    now = await stub.Lookup(lookup_request(keys=[KEY_A, KEY_B]))
    assert not now.offsets, "not asked to wait"
    waits = lookup_request(keys=[KEY_A, KEY_B], waits_for_writers=True, max_wait_s=30.0)
    reading = asyncio.ensure_future(stub.Lookup(waits, timeout=30))
    for number in numbers:
        await asyncio.wait([reading], timeout=0.05)
        assert not reading.done(), "it did not wait for the whole prefix"
        await stub.Seal(seal_request([number], [7]))
    assert len((await reading).offsets) == 2


@pytest.mark.parametrize("end", ["acknowledged", "expired", "out of time"])
async def test_a_reader_waits_no_longer_than_the_writer_writes(service: Service, end: str) -> None:
    await connect(service)
    stub = service.stub
    sealed = await put(service, keys=[KEY_A])
    reserved = await stub.Reserve(reserve_request(keys=[KEY_A, KEY_B], ttl_s=10.0))
    max_wait_s = 0.05 if end == "out of time" else 30.0
    waits = lookup_request(keys=[KEY_A, KEY_B], waits_for_writers=True, max_wait_s=max_wait_s)
    reading = asyncio.ensure_future(stub.Lookup(waits, timeout=30))
    if end != "out of time":
        await asyncio.wait([reading], timeout=0.05)
        assert not reading.done()
    if end == "acknowledged":
        number = reserved.reservations[1].reservation_id
        await stub.Acknowledge(acknowledge_request(number))
    elif end == "expired":
        service.now[0] += 11.0
        service.index.expire()
    assert len((await reading).offsets) == len(sealed) == 1


async def test_discard_of_a_private_block_under_way(service: Service) -> None:
    await connect(service)
    stub = service.stub
    reserved = await stub.Reserve(reserve_request(keys=[KEY_A], is_private=True))
    number = reserved.reservations[0].reservation_id
    assert (await stub.Discard(pb.DiscardRequest(keys=[KEY_A]))).num_dropped == 1
    assert not any((await stub.Seal(seal_request([number], [7]))).sealed)
    assert service.index.counts().num_quarantined == 1, "its writer may still write"
    assert (await stub.Acknowledge(acknowledge_request(number))).num_freed == 1
