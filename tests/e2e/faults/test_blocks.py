"""Blocks that are not what was sealed, and stores that are not what they were: never a wrong token.

Bytes are changed in the store's own memory; messages at the gates.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from protos import kvstore_pb2
from tests.support.books import Books
from tests.support.gated_mesh import STORE, GatedMesh
from tests.support.injectors import read_memory, write_memory
from tests.support.mixture import Mixture, salted
from tests.support.streams import Stream, same_answer

LOOKUP, RELEASE = f"{STORE}/Lookup", f"{STORE}/Release"


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _truncate(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


@pytest.mark.parametrize("change", [_flip, _truncate, None], ids=["flip", "truncate", "duplicate"])
def test_a_changed_block_is_dropped_and_computed_again(
    gated_mesh: GatedMesh, mixture: Mixture, books: Books, change: Callable[[bytes], bytes] | None
) -> None:
    mesh, store = gated_mesh, gated_mesh.kvstores[0]
    gate = mesh.gate("decode", store)
    with gate.hold(LOOKUP, "response", wants=_has_blocks) as hold:
        stream = Stream(mesh.generation, salted(mixture.requests[0]))
        hold.wait_reached()
        leased = kvstore_pb2.LookupResponse.FromString(hold.messages[0]).blocks
        arena, _ = mesh.arena_of(store)
        slots = [(arena + block.slot.offset, block.slot.num_bytes) for block in leased]
        good = read_memory(store, *slots[1])
        write_memory(store, slots[1][0], change(good) if change else read_memory(store, *slots[0]))
        hold.release()
        same_answer(stream.result(), mixture.expected[0])
    reports = [kvstore_pb2.ReleaseRequest.FromString(m) for m in gate.sent[RELEASE]]
    lookup = kvstore_pb2.LookupRequest.FromString(gate.seen[LOOKUP][0][0])
    assert reports[-1].corrupt_keys or any(report.corrupt_keys for report in reports), lookup
    again = Stream(mesh.generation, stream.request)
    same_answer(again.result(), mixture.expected[0])
    books.settle()


def _has_blocks(message: bytes) -> bool:
    return len(kvstore_pb2.LookupResponse.FromString(message).blocks) >= 2
