"""Clients that cancel, run out of time, vanish or read slowly in each phase: nothing stays behind,
and whoever stays gets the exact answer.
"""

from __future__ import annotations

import grpc
import pytest

from protos import gateway_pb2_grpc
from tests.support.books import Books
from tests.support.gated_mesh import PHASES, GatedMesh
from tests.support.generate import generate
from tests.support.mixture import Mixture, salted
from tests.support.relay import Relay
from tests.support.streams import Stream, same_answer

NUM_TOKENS = 800
DEADLINE_S = 1.5
LEAVINGS = {
    "cancel": grpc.StatusCode.CANCELLED,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    "reset": grpc.StatusCode.UNAVAILABLE,
}


DEFAULT = {
    ("cancel", "queued"),
    ("cancel", "prefetch"),
    ("cancel", "get"),
    ("cancel", "mid-stream"),
    ("deadline", "get"),
    ("reset", "put"),
}
CASES = [
    pytest.param(
        *(leaving, phase),
        id=f"{leaving}-{phase}".replace(" ", "-"),
        marks=() if (leaving, phase) in DEFAULT else pytest.mark.slow,
    )
    for leaving in LEAVINGS
    for phase in PHASES
]


@pytest.mark.parametrize(("leaving", "phase"), CASES)
def test_a_client_that_leaves_takes_its_work_with_it(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, leaving: str, phase: str
) -> None:
    mesh = gated_mesh
    request = salted(mixture.requests[0])
    request.stopping.max_new_tokens = NUM_TOKENS
    timeout_s = DEADLINE_S if leaving == "deadline" else 60.0
    with (
        Relay(mesh.address) as relay,
        grpc.insecure_channel(relay.address) as channel,
        mesh.in_phase(phase) as reach,
    ):
        stub = gateway_pb2_grpc.GenerationServiceStub(channel)
        leaver = Stream(stub, request, timeout_s=timeout_s)
        release = reach(leaver)
        stayer = Stream(mesh.generation, salted(mixture.requests[1]))
        if leaving == "cancel":
            leaver.cancel()
        elif leaving == "reset":
            assert relay.reset() > 0, "no connection was there to be reset"
        assert leaver.failure(timeout_s=10) is LEAVINGS[leaving]
        release()
        same_answer(stayer.result(), mixture.expected[1])
    assert leaver.num_tokens < NUM_TOKENS
    books.settle()


def test_a_slow_reader_gets_all_and_delays_nobody(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh = gated_mesh
    request = salted(mixture.requests[0])
    request.stopping.max_new_tokens = NUM_TOKENS
    request.output.logprobs = 20  # more bytes than the client's windows hold
    expected = generate(mesh, request)
    small_windows = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(mesh.address, options=small_windows) as channel:
        slow = Stream(gateway_pb2_grpc.GenerationServiceStub(channel), request)
        slow.wait_tokens(1)
        with slow.paused():
            mixture.verify(mixture.start(mesh))
            mesh.wait_until(
                lambda: all(not mesh.status(p.address).counts.num_requests for p in mesh.decodes),
                "the ranks have generated all",
            )
            assert not slow.is_over, "it was not slow"
        same_answer(slow.result(), expected)
    assert slow.answer.num_deltas < NUM_TOKENS * 3 // 4, "nothing was coalesced"
    books.settle()
