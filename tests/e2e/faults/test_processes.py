"""Each role killed, frozen or restarted in each phase of requests: the answers are those of
undisturbed runs, and afterwards nothing is held anywhere.

A phase is not timed: requests wait at a gate, or have sent a known number of tokens.
"""

from __future__ import annotations

from contextlib import nullcontext

import grpc
import pytest

from tests.support.books import Books
from tests.support.gated_mesh import BEFORE_HANDOFF, PHASES, WITHOUT_RANK, GatedMesh
from tests.support.injectors import frozen, kill, restart, revive
from tests.support.mesh import Process
from tests.support.mixture import Mixture, salted
from tests.support.streams import Stream

ROLES = ("prefill", "decode", "kvstore")
FAULTS = ("kill", "freeze", "restart")
# What runs by default: each role and fault where it hurts most. `-m slow` runs the others.
DEFAULT = {
    ("prefill", "kill", "put"),
    ("decode", "kill", "prefetch"),
    ("decode", "kill", "mid-stream"),
    ("decode", "freeze", "mid-stream"),
    ("kvstore", "freeze", "get"),
    ("kvstore", "restart", "between"),
}
CASES = [
    pytest.param(
        *(role, fault, phase),
        id=f"{role}-{fault}-{phase}".replace(" ", "-"),
        marks=() if (role, fault, phase) in DEFAULT else pytest.mark.slow,
    )
    for role in ROLES
    for fault in FAULTS
    for phase in PHASES
]


def victim_of(mesh: GatedMesh, role: str) -> Process:
    """The process of this role that has most requests."""
    processes = {"prefill": mesh.prefills, "decode": mesh.decodes, "kvstore": mesh.kvstores}[role]
    return max(processes, key=lambda p: mesh.status(p.address).counts.num_requests)


@pytest.mark.parametrize(("role", "fault", "phase"), CASES)
def test_answers_are_exact_whatever_happens_to_a_process(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, role: str, fault: str, phase: str
) -> None:
    mesh = gated_mesh
    num_prefills, num_resumes = mesh.num_prefills(), mesh.num_resumes()
    with mesh.in_phase(phase) as reach:
        streams = mixture.start(mesh)
        release = reach(*streams)
        victim = victim_of(mesh, role)
        books.lose()
        with frozen(mesh, victim) if fault == "freeze" else nullcontext():
            if fault == "kill":
                kill(victim)
            elif fault == "restart":
                restart(mesh, victim)
            release()
            mixture.verify(streams)
    # It hit requests: those were prefilled or resumed once more than there are requests.
    if role == "prefill" and phase in BEFORE_HANDOFF:
        assert mesh.num_prefills() > num_prefills + len(streams)
    if role == "decode" and phase not in WITHOUT_RANK:
        assert mesh.num_resumes() > num_resumes
    if fault == "kill":
        revive(mesh, victim)
    books.settle(expects_promises=True)


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param(phase, marks=() if phase == "mid-stream" else pytest.mark.slow)
        for phase in PHASES
    ],
)
def test_a_killed_gateway_is_a_clear_error_and_the_same_request_works_again(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, phase: str
) -> None:
    mesh = gated_mesh
    with mesh.in_phase(phase) as reach:
        streams = mixture.start(mesh)
        release = reach(*streams)
        books.lose()
        kill(mesh.gateway)
        errors = [stream.end(timeout_s=5) for stream in streams]
        release()
        revive(mesh, mesh.gateway)
        again = [Stream(mesh.generation, stream.request) for stream in streams]
        mixture.verify(again)
    codes = {error.code() for error in errors if error is not None}  # pyright: ignore[reportAttributeAccessIssue]
    assert codes == {grpc.StatusCode.UNAVAILABLE}
    books.settle(expects_promises=True)


@pytest.mark.parametrize(
    "phase",
    [pytest.param(phase, marks=pytest.mark.slow) for phase in PHASES],
)
def test_a_frozen_gateway_goes_on_where_it_was(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, phase: str
) -> None:
    mesh = gated_mesh
    with mesh.in_phase(phase) as reach:
        streams = mixture.start(mesh)
        release = reach(*streams)
        with frozen(mesh, mesh.gateway):
            late = Stream(mesh.generation, salted(mixture.requests[0]), timeout_s=1.0)
            release()
            assert late.failure() is grpc.StatusCode.DEADLINE_EXCEEDED
        mixture.verify(streams)
    books.settle()


def test_what_the_dead_held_in_the_store_expires(gated_mesh: GatedMesh, books: Books) -> None:
    books.settle(timeout_s=60.0)  # leases and reservations last 30 s
