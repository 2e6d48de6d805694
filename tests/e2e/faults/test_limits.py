"""A process without free descriptors, and wall clocks that jump: requests under way do not care."""

from __future__ import annotations

import pytest

from tests.support.books import Books
from tests.support.gated_mesh import GatedMesh
from tests.support.injectors import without_descriptors
from tests.support.mixture import Mixture

DAY_S = 86_400


@pytest.mark.parametrize(
    "role",
    [
        "decode",
        *(pytest.param(r, marks=pytest.mark.slow) for r in ("gateway", "prefill", "kvstore")),
    ],
)
def test_a_process_without_free_descriptors_serves_whom_it_knows(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, role: str
) -> None:
    mesh = gated_mesh
    victim = next(process for process in mesh.processes if process.role == role)
    num_resumes = mesh.num_resumes()
    with without_descriptors(victim):
        # Longer than the gateway lets an instance be silent, so that a failing poll would show.
        for _ in range(3):
            mixture.verify(mixture.start(mesh))
        if role != "gateway":  # which cannot be asked now
            assert all(instance.ready for instance in mesh.instances()), "it was given up"
    assert mesh.num_resumes() == num_resumes
    books.settle()


@pytest.mark.parametrize(
    "jumps_s",
    [
        pytest.param((-DAY_S, 3 * DAY_S), id="to-and-fro"),
        pytest.param((DAY_S,), id="forward", marks=pytest.mark.slow),
    ],
)
def test_wall_clocks_that_jump_change_nothing(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, jumps_s: tuple[int, ...]
) -> None:
    mesh = gated_mesh
    num_reads = mesh.clock.num_reads
    try:
        streams = mixture.start(mesh)
        for jump_s in jumps_s:
            streams[0].wait_tokens(1)
            mesh.clock.jump(jump_s)
        mixture.verify(streams)
        mixture.verify(mixture.start(mesh))
        assert mesh.clock.num_reads > num_reads, "no process saw the jump"
        books.settle()
    finally:
        mesh.clock.jump(0)
    mixture.verify(mixture.start(mesh))
    books.settle()
