"""The pull that begins before prefill has finished: it is used, and losing it changes nothing."""

from __future__ import annotations

from protos import kvstore_pb2
from tests.support.books import Books
from tests.support.gated_mesh import STORE, GatedMesh
from tests.support.injectors import kill, revive
from tests.support.mixture import Mixture, salted
from tests.support.streams import Stream, same_answer

LOOKUP = f"{STORE}/Lookup"


def _num_held(mesh: GatedMesh) -> list[int]:
    """Blocks that each decode rank holds."""
    return [mesh.status(rank.address).counts.num_blocks_used for rank in mesh.decodes]


def _num_asked(mesh: GatedMesh) -> int:
    """Keys that decode ranks have looked up so far."""
    requests = mesh.gate("decode", mesh.kvstores[0]).sent[LOOKUP]
    return sum(len(kvstore_pb2.LookupRequest.FromString(request).keys) for request in requests)


def test_an_admission_finds_the_kv_that_was_prefetched(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh = gated_mesh
    before, num_asked = [mesh.pulled_tokens(rank) for rank in mesh.decodes], _num_asked(mesh)
    with mesh.held_before_finish() as hold:
        stream = Stream(mesh.generation, salted(mixture.requests[0]))
        hold.wait_reached()
        num_keys = 4  # of 200 tokens: three blocks and the tail
        mesh.wait_until(lambda: _num_asked(mesh) == num_asked + num_keys, "the rank asks for all")
        assert sum(_num_held(mesh)) == num_keys and stream.num_tokens == 0
        hold.release()
        same_answer(stream.result(), mixture.expected[0])
    after = [mesh.pulled_tokens(rank) for rank in mesh.decodes]
    new = [n for a, b in zip(after, before, strict=True) for n in a[len(b) :]]
    assert new == [200] and _num_asked(mesh) == num_asked + num_keys, "it was pulled twice"
    books.settle()


def test_a_prefill_that_dies_before_it_finishes_takes_the_prefetch_with_it(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh = gated_mesh
    num_prefills, num_cancels = mesh.num_prefills(), len(mesh.sent("cancel"))
    num_prefetches = len(mesh.sent("prefetch"))
    with mesh.held_before_finish() as hold:
        stream = Stream(mesh.generation, salted(mixture.requests[0]))
        hold.wait_reached()
        number = next(i for i, one in enumerate(hold.holds) if one.num_held)
        victim = mesh.prefills[number]
        books.lose()
        with mesh.gate("gateway", victim).cut():  # what it has said last is lost with it
            kill(victim)
            mesh.wait_until(lambda: len(mesh.sent("prefetch")) == num_prefetches + 2, "a retry")
            hold.release()
            same_answer(stream.result(), mixture.expected[0])
    assert len(mesh.sent("cancel")) == num_cancels + 1, "the first prefetch was not cancelled"
    assert mesh.num_prefills() == num_prefills + 2
    revive(mesh, victim)
    books.settle(expects_promises=True)


def test_a_prefetch_whose_admission_is_late_ends_by_itself(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh = gated_mesh
    with mesh.held_before_finish() as hold:
        stream = Stream(mesh.generation, salted(mixture.requests[0]))
        hold.wait_reached()
        mesh.wait_until(lambda: any(_num_held(mesh)), "a rank holds blocks")
        mesh.wait_until(lambda: not any(_num_held(mesh)), "the rank frees them")
        assert stream.num_tokens == 0 and not stream.is_over
        hold.release()
        same_answer(stream.result(), mixture.expected[0])
    books.settle()


def test_a_request_that_ends_with_its_first_token_is_never_prefetched(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books
) -> None:
    mesh = gated_mesh
    num_prefetches = len(mesh.sent("prefetch"))
    request = salted(mixture.requests[0])
    request.stopping.max_new_tokens = 1
    assert len(Stream(mesh.generation, request).result().tokens[0]) == 1
    assert len(mesh.sent("prefetch")) == num_prefetches
    books.settle()
