"""Ranks that are given up while they live: what they say later is dropped, and they serve again.

Either the process stops (frozen), or only its path to the gateway does (a gate is shut).
"""

from __future__ import annotations

import time

import pytest

from protos import decode_pb2
from tests.support.books import Books
from tests.support.gated_mesh import SESSION, STATUS, GatedMesh
from tests.support.injectors import frozen
from tests.support.mesh import Process
from tests.support.mixture import Mixture, salted
from tests.support.streams import Stream, same_answer

LONG = 600
BOUND_S = 20.0  # the design says 2 s; a busy machine of two cores gets ten times that


def _start_long(mesh: GatedMesh, mixture: Mixture) -> tuple[Stream, Process]:
    """A stream of LONG tokens that has begun, and the rank it is on."""
    request = salted(mixture.requests[0])
    request.stopping.max_new_tokens = LONG
    stream = Stream(mesh.generation, request)
    stream.wait_tokens(20)
    busy = [p for p in mesh.decodes if mesh.status(p.address).counts.num_requests]
    assert len(busy) == 1 and not stream.is_over
    return stream, busy[0]


def test_what_a_woken_rank_says_is_dropped(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh = gated_mesh
    calm, _ = _start_long(mesh, mixture)
    expected = calm.result()
    stream, zombie = _start_long(mesh, mixture)
    gate = mesh.gate("gateway", zombie)
    books.lose()
    with gate.hold(SESSION, "response") as hold:
        hold.wait_reached()  # tokens that are on their way now will be late
        with frozen(mesh, zombie):
            frozen_at = time.monotonic()
            num_before = stream.num_tokens
            stream.wait_tokens(num_before + 1, BOUND_S)
            assert time.monotonic() - frozen_at < BOUND_S
            same_answer(stream.result(), expected)
        hold.release()
    late = [o for m in hold.messages for o in decode_pb2.SessionResponse.FromString(m).outputs]
    assert any(output.token_ids for output in late), "nothing was late"
    books.settle()
    mixture.verify(mixture.start(mesh))


@pytest.mark.slow
def test_a_rank_that_cannot_be_heard_goes_on_in_vain(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh = gated_mesh
    calm, _ = _start_long(mesh, mixture)
    expected = calm.result()
    stream, zombie = _start_long(mesh, mixture)
    gate = mesh.gate("gateway", zombie)
    num_generated = mesh.status(zombie.address).counts.num_tokens
    with gate.hold(SESSION, "response") as session, gate.hold(STATUS) as polls:
        session.wait_reached()
        polls.wait_reached()
        same_answer(stream.result(BOUND_S), expected)
        assert mesh.status(zombie.address).counts.num_tokens > num_generated, "it did not go on"
        session.release()
        polls.release()
    assert any(decode_pb2.SessionResponse.FromString(m).outputs for m in session.messages)
    books.settle()
    mixture.verify(mixture.start(mesh))


@pytest.mark.parametrize("user", ["gateway", pytest.param("decode", marks=pytest.mark.slow)])
def test_a_cut_path_moves_the_work_or_recomputes(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, user: str
) -> None:
    mesh = gated_mesh
    stream, rank = _start_long(mesh, mixture)
    gate = mesh.gate(user, rank if user == "gateway" else mesh.kvstores[0])
    num_resumes = mesh.num_resumes()
    with gate.cut():
        mixture.verify(mixture.start(mesh))
    assert len(stream.result().tokens[0]) == LONG
    assert (mesh.num_resumes() > num_resumes) == (user == "gateway")
    books.settle(expects_promises=True)
