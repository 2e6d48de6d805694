"""Tenants of a whole mesh: one that uses much leaves the others' prefixes alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos import kvstore_pb2, kvstore_pb2_grpc
from tests.support.generate import generate, greedy_request
from tests.support.mesh import Mesh, running_mesh

# A tenant has four slots of 32 KiB: a prompt's three full blocks and its private tail.
STORE_FLAGS = ("--tenant-bytes", "128KiB")


@pytest.fixture(scope="module")
def mesh(tiny_model: Path) -> Iterator[Mesh]:
    with running_mesh(tiny_model, store_bytes="2MiB", store_flags=STORE_FLAGS) as mesh:
        yield mesh


def num_cached(mesh: Mesh, prompt: list[int], salt: str) -> int:
    request = greedy_request(prompt, 4)
    request.cache_salt = salt
    usage = generate(mesh, request).usage
    assert usage is not None
    return usage.num_cached_tokens


def watched_keys(mesh: Mesh) -> set[bytes]:
    """What a fresh watcher is told before it is current."""
    keys: set[bytes] = set()
    with grpc.insecure_channel(mesh.kvstores[0].address) as channel:
        stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        for message in stub.Watch(kvstore_pb2.WatchRequest(), timeout=20):
            if message.kind == kvstore_pb2.WatchResponse.KIND_CURRENT:
                break
            keys |= {key for change in message.changes for key in change.keys}
    return keys


def test_a_tenant_that_uses_much_evicts_its_own(mesh: Mesh) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(200)] for _ in range(4)]
    assert num_cached(mesh, prompts[0], "quiet") == 0
    for prompt in prompts:
        assert num_cached(mesh, prompt, "busy") == 0
    assert num_cached(mesh, prompts[0], "quiet") == 192
    assert num_cached(mesh, prompts[0], "busy") < 192
    counts = mesh.status(mesh.kvstores[0].address).counts
    assert counts.num_blocks_used <= 8, "of 64"
    mesh.wait_until(
        lambda: mesh.status(mesh.kvstores[0].address).counts.num_blocks_private == 0, "tails go"
    )
    num_sealed = mesh.status(mesh.kvstores[0].address).counts.num_blocks_sealed
    assert len(watched_keys(mesh)) == num_sealed > 0
