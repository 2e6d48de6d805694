"""Blocks that are not what was sealed, and stores that are not what they were: never a wrong token.

Bytes are changed in the store's own memory, messages at the gates.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from protos import kvstore_pb2
from tests.support.books import Books
from tests.support.gated_mesh import STORE, GatedMesh
from tests.support.injectors import read_memory, restart, write_memory
from tests.support.mixture import Mixture, salted
from tests.support.streams import Stream, same_answer

ACKNOWLEDGE, LOOKUP, RELEASE, RESERVE, SEAL = (
    f"{STORE}/{name}" for name in ("Acknowledge", "Lookup", "Release", "Reserve", "Seal")
)


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _truncate(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def _has_blocks(message: bytes) -> bool:
    return len(kvstore_pb2.LookupResponse.FromString(message).offsets) >= 2


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_flip, id="flip"),
        pytest.param(_truncate, id="truncate", marks=pytest.mark.slow),
        pytest.param(None, id="duplicate", marks=pytest.mark.slow),
    ],
)
def test_a_changed_block_is_reported_and_computed_again(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, change: Callable[[bytes], bytes] | None
) -> None:
    mesh, store = gated_mesh, gated_mesh.kvstores[0]
    gate = mesh.gate("decode", store)
    with gate.hold(LOOKUP, "response", wants=_has_blocks) as hold:
        stream = Stream(mesh.generation, salted(mixture.requests[0]))
        hold.wait_reached()
        requests = map(kvstore_pb2.LookupRequest.FromString, gate.sent[LOOKUP])
        keys = [request.keys for request in requests if len(request.keys) > 1][-1]  # no tail's
        lent = kvstore_pb2.LookupResponse.FromString(hold.messages[0])
        places = [mesh.arena_of(store) + offset for offset in lent.offsets[:2]]
        first, second = (read_memory(store, place, lent.num_bytes) for place in places)
        write_memory(store, places[1], change(second) if change else first)
        hold.release()
        same_answer(stream.result(), mixture.expected[0])
    reports = (kvstore_pb2.ReleaseRequest.FromString(message) for message in gate.sent[RELEASE])
    assert [key for report in reports for key in report.corrupt_keys if key in keys] == [keys[1]]
    same_answer(Stream(mesh.generation, stream.request).result(), mixture.expected[0])
    books.settle()


@pytest.mark.slow
@pytest.mark.parametrize("field", ["offset", "num_bytes"])
def test_slots_outside_the_arena_are_not_read(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, field: str
) -> None:
    mesh, gate = gated_mesh, gated_mesh.gate("decode", gated_mesh.kvstores[0])
    num_rewritten = 0

    def misplace(message: bytes) -> bytes:
        nonlocal num_rewritten
        response = kvstore_pb2.LookupResponse.FromString(message)
        if field == "num_bytes":
            response.num_bytes = 2**40
        else:
            response.offsets[:] = [2**40] * len(response.offsets)
        num_rewritten += len(response.offsets)
        return response.SerializeToString()

    with gate.rewritten(LOOKUP, misplace):
        mixture.verify(mixture.start(mesh))
    assert num_rewritten
    books.settle()


def test_a_lease_that_did_not_hold_gives_no_token(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh, gate = gated_mesh, gated_mesh.gate("decode", gated_mesh.kvstores[0])
    expired = kvstore_pb2.ReleaseResponse(outcome=kvstore_pb2.ReleaseResponse.OUTCOME_EXPIRED)
    num_placed = {rank.address: len(mesh.pulled_tokens(rank)) for rank in mesh.decodes}
    with gate.rewritten(RELEASE, lambda _: expired.SerializeToString()):
        mixture.verify(mixture.start(mesh))
    pulled = [n for r in mesh.decodes for n in mesh.pulled_tokens(r)[num_placed[r.address] :]]
    assert len(pulled) == len(mixture.requests) and not any(pulled)
    books.settle()


@pytest.mark.parametrize(
    "outcome",
    ["OUTCOME_FULL", pytest.param("OUTCOME_ALREADY_RESERVED", marks=pytest.mark.slow)],
)
def test_a_store_that_takes_nothing_costs_only_recomputation(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, outcome: str
) -> None:
    mesh, gate = gated_mesh, gated_mesh.gate("prefill", gated_mesh.kvstores[0])
    num_granted = 0
    refusal = kvstore_pb2.Reservation(outcome=outcome)

    def refuse(message: bytes) -> bytes:
        nonlocal num_granted
        response = kvstore_pb2.ReserveResponse.FromString(message)
        for reservation in response.reservations:
            num_granted += reservation.reservation_id > 0
            reservation.CopyFrom(refusal)
        return response.SerializeToString()

    with gate.rewritten(RESERVE, refuse):
        mixture.verify(mixture.start(mesh))
    assert num_granted
    # No worker knows of these: they would stay reserved until their deadline, minutes from now.
    requests = [kvstore_pb2.ReserveRequest.FromString(sent) for sent in gate.sent[RESERVE]]
    for incarnation in {request.incarnation for request in requests}:
        given_back = kvstore_pb2.AcknowledgeRequest(
            incarnation=incarnation,
            attempts=[r.attempt for r in requests if r.incarnation == incarnation][-4096:],
        )
        gate.send(ACKNOWLEDGE, given_back.SerializeToString())
    books.settle()


def test_messages_of_an_earlier_life_change_nothing(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh, store = gated_mesh, gated_mesh.kvstores[0]
    gate = mesh.gate("prefill", store)
    mixture.verify(mixture.start(mesh))
    stale = {method: gate.sent[method][-1] for method in (SEAL, RESERVE, LOOKUP)}
    books.lose()
    restart(mesh, store)
    mixture.verify(mixture.start(mesh))  # workers learn of the restart by being refused
    mesh.wait_until(lambda: mesh.status(mesh.kvstores[0].address).detail[0] == "4", "4 workers")
    books.settle()
    store = mesh.kvstores[0]
    before = mesh.status(store.address).counts
    for method, message in stale.items():
        with pytest.raises(grpc.RpcError) as refused:
            gate.send(method, _as_caller(method, message, "gone"))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION, method
    # The workers have connected to the new store, but its ids are others: nothing is sealed.
    answer = gate.send(SEAL, stale[SEAL])
    assert not any(kvstore_pb2.SealResponse.FromString(answer).sealed)
    after = mesh.status(store.address).counts
    assert after.num_blocks_used == before.num_blocks_used
    mixture.verify(mixture.start(mesh))
    books.settle()


def _as_caller(method: str, message: bytes, incarnation: str) -> bytes:
    kind = getattr(kvstore_pb2, method.rpartition("/")[2] + "Request")
    request = kind.FromString(message)
    request.incarnation = incarnation
    return request.SerializeToString()
