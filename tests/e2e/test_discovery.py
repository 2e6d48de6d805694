"""Stores that are listed in a file: one joins and one leaves under load, and the file goes away."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from kv.block import block_keys, salted_root
from mesh.rendezvous import owner
from protos import status_pb2, status_pb2_grpc
from tests.support.books import Books
from tests.support.generate import Answer, generate, greedy_request
from tests.support.mesh import Mesh, Process, wait_ready

BLOCK_TOKENS, NUM_FULL = 64, 3
NUM_TOKENS = 8
NUM_FLAPS = 3
STORE_FLAGS = ("--private-ttl-s", "10", "--quarantine-s", "2")
SETTLE_S = 60.0  # longer than a lease whose Release was lost on a busy machine


class ListedMesh(Mesh):
    """One of each worker, two kvstores; who uses them reads their addresses in `path`.

    While two processes have different lists, a rank looks for a tail where it is not: it computes
    it, and the copy in the store expires.
    """

    def __init__(self, model: Path, path: Path) -> None:
        self.path = path
        super().__init__(model, num_kvstore=2, store_flags=STORE_FLAGS)

    def store_sources(self, user: str) -> str:
        if user == "prefill" and not hasattr(self, "prefills"):
            self.list_stores()
        return f"file:{self.path}"

    def list_stores(self) -> None:
        """Puts a new file in the place of the old one."""
        lines = [f"{process.address}  # store {i}" for i, process in enumerate(self.kvstores)]
        new = self.path.with_suffix(".new")
        new.write_text("\n".join(["# the stores", "", *lines, ""]))
        os.replace(new, self.path)

    def add_store(self) -> Process:
        """Starts one more and lists it; does not wait for anybody to notice."""
        process = self.spawn_store()
        wait_ready(process)
        self.kvstores.append(process)
        self.list_stores()
        return process

    def wait_listed(self) -> None:
        """Until gateway and workers use the listed stores, all of them up and no other."""
        wanted = [process.address for process in self.kvstores]
        self.wait_until(lambda: self.seen_by_gateway() == (wanted, True), "the gateway's stores")
        for process in [*self.prefills, *self.decodes]:
            self.wait_until(
                lambda a=process.address: self.used_by(a) == dict.fromkeys(wanted, "up"),
                f"the stores of {process.role}",
            )

    def seen_by_gateway(self) -> tuple[list[str], bool]:
        """Addresses of the stores in the gateway's status, and whether all are ready."""
        with grpc.insecure_channel(self.admin_address) as channel:
            stub = status_pb2_grpc.StatusServiceStub(channel)
            instances = stub.GetStatus(status_pb2.GetStatusRequest(), timeout=5).instances
        stores = [i for i in instances if i.role == status_pb2.ROLE_KVSTORE]
        return [i.address for i in stores], all(i.ready for i in stores)

    def used_by(self, address: str) -> dict[str, str]:
        """A worker's stores and their states."""
        words = self.status(address).detail.removeprefix("kvstore: ")
        if words == "no kvstore":
            return {}
        stores = (store.split() for store in words.split(", "))
        return {address: state for address, state, *_ in stores}  # and the path of its blocks

    def num_sealed(self) -> dict[str, int]:
        """Sealed blocks of each store."""
        addresses = [process.address for process in self.kvstores]
        return {a: self.status(a).counts.num_blocks_sealed for a in addresses}


class Load:
    """Cold requests for the same prompts in a loop; `num_done` counts, `failures` is what broke."""

    def __init__(self, mesh: Mesh, expected: list[tuple[list[int], list[int]]]) -> None:
        self._mesh, self._expected = mesh, expected
        self._over = threading.Event()
        self._salts = itertools.count()
        self.num_done = 0
        self.failures: list[BaseException] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Load while inside; fails if any request failed or changed."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(60)
        if self.failures:
            raise self.failures[0]

    def wait_more(self, num: int) -> None:
        """Until that many more requests are answered, or one failed."""
        wanted = self.num_done + num
        self._mesh.wait_until(lambda: self.failures or self.num_done >= wanted, "load goes on")

    def _run(self) -> None:
        try:
            for prompt, tokens in itertools.cycle(self._expected):
                if self._over.is_set():
                    return
                request = greedy_request(prompt, NUM_TOKENS)
                request.cache_salt = f"load-{next(self._salts)}"
                assert generate(self._mesh, request).tokens[0] == tokens
                self.num_done += 1
        except BaseException as failure:
            self.failures.append(failure)


@pytest.fixture(scope="module")
def mesh(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ListedMesh]:
    """One mesh for all tests; each leaves the stores it found, or others of their number."""
    made = ListedMesh(tiny_model, tmp_path_factory.mktemp("list") / "stores")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def prompts(request: pytest.FixtureRequest) -> list[list[int]]:
    rng = random.Random(request.node.name)
    return [[rng.randrange(256) for _ in range(200)] for _ in range(40)]


def _ask(mesh: Mesh, prompt: list[int]) -> Answer:
    return generate(mesh, greedy_request(prompt, NUM_TOKENS))


def _num_cached(answer: Answer) -> int:
    assert answer.usage is not None
    return answer.usage.num_cached_tokens


def _owners(mesh: Mesh, prompt: list[int]) -> list[str]:
    """The store of each full block of a prompt."""
    root = salted_root(mesh.status(mesh.prefills[0].address).model.fingerprint, "")
    keys = block_keys(root, prompt[: NUM_FULL * BLOCK_TOKENS], BLOCK_TOKENS)
    members = [process.address for process in mesh.kvstores]
    return [owner(key, members) for key in keys]


def _num_leading(values: list[bool]) -> int:
    return len(list(itertools.takewhile(bool, values)))


def _expect_hits(mesh: Mesh, expected: list[tuple[list[int], list[int]]], hits: list[int]) -> None:
    """Each prompt has so many leading blocks left in the stores; then it has all of them again."""
    for (prompt, tokens), num_blocks in zip(expected, hits, strict=True):
        answer = _ask(mesh, prompt)
        assert (answer.tokens[0], _num_cached(answer)) == (tokens, num_blocks * BLOCK_TOKENS)
        assert _num_cached(_ask(mesh, prompt)) == NUM_FULL * BLOCK_TOKENS


def _expect_shares(mesh: ListedMesh, prompts: list[list[int]], address: str) -> None:
    """Blocks of new prompts go to their owners, and this store gets its share of them."""
    counts = mesh.num_sealed()
    for prompt in prompts:
        _ask(mesh, prompt)
    gained = {store: num - counts[store] for store, num in mesh.num_sealed().items()}
    owners = [store for prompt in prompts for store in _owners(mesh, prompt)]
    assert gained == {store: owners.count(store) for store in gained}
    assert gained[address] > len(owners) / 6


def test_a_store_joins_and_another_leaves_under_load(
    mesh: ListedMesh, prompts: list[list[int]]
) -> None:
    expected = [(prompt, _ask(mesh, prompt).tokens[0]) for prompt in prompts[:12]]
    assert all(_num_cached(_ask(mesh, prompt)) == 192 for prompt, _ in expected)
    mesh.wait_listed()
    before = [_owners(mesh, prompt) for prompt, _ in expected]
    books, load = Books(mesh), Load(mesh, expected)
    with load.running():
        load.wait_more(2)
        third = mesh.add_store()
        mesh.wait_listed()
        load.wait_more(5)
    books.lose()  # connections to one more peer
    books.settle(timeout_s=SETTLE_S)
    joined = [_owners(mesh, prompt) for prompt, _ in expected]
    same = [
        [a == b for a, b in zip(*pair, strict=True)] for pair in zip(before, joined, strict=True)
    ]
    _expect_hits(mesh, expected, [_num_leading(blocks) for blocks in same])
    _expect_shares(mesh, prompts[12:], third.address)

    load = Load(mesh, expected)
    with load.running():
        load.wait_more(2)
        gone = mesh.kvstores.pop(0)
        mesh.list_stores()
        mesh.wait_listed()
        gone.popen.send_signal(signal.SIGTERM)
        assert gone.popen.wait(30) == 0, gone.tail()
        load.wait_more(5)
    books.settle(timeout_s=SETTLE_S)
    stayed = [[store != gone.address for store in owners] for owners in joined]
    _expect_hits(mesh, expected, [_num_leading(blocks) for blocks in stayed])
    books.settle(timeout_s=SETTLE_S)


def test_a_store_that_comes_and_goes_leaves_nothing_behind(
    mesh: ListedMesh, prompts: list[list[int]]
) -> None:
    expected = [(prompt, _ask(mesh, prompt).tokens[0]) for prompt in prompts[:4]]
    mesh.wait_listed()
    books, load = Books(mesh), Load(mesh, expected)
    with load.running():
        gone = mesh.kvstores.pop()
        for _ in range(NUM_FLAPS):
            mesh.list_stores()
            mesh.wait_listed()
            mesh.kvstores.append(gone)
            mesh.list_stores()
            mesh.wait_listed()
            load.wait_more(1)
            mesh.kvstores.remove(gone)
        mesh.kvstores.append(gone)
    books.lose()
    books.settle(timeout_s=SETTLE_S)


def test_a_list_that_is_missing_keeps_who_runs_and_delays_nobody_who_starts(
    mesh: ListedMesh, prompts: list[list[int]]
) -> None:
    prompt = prompts[0]
    tokens = _ask(mesh, prompt).tokens[0]
    assert _num_cached(_ask(mesh, prompt)) == 192
    away = mesh.path.with_suffix(".away")
    mesh.path.rename(away)
    for process in (mesh.prefills[0], mesh.gateway):
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(30) == 0, process.tail()
        wait_ready(mesh.respawn(process))
    assert mesh.used_by(mesh.prefills[0].address) == {}
    assert mesh.seen_by_gateway() == ([], True)
    wanted = [process.address for process in mesh.kvstores]
    assert mesh.used_by(mesh.decodes[0].address) == dict.fromkeys(wanted, "up")
    for process in (mesh.prefills[0], mesh.gateway, mesh.decodes[0]):
        words = f"file:{mesh.path}: No such file"
        mesh.wait_until(lambda p=process, w=words: w in "\n".join(p.lines), "a warning")
    answer = _ask(mesh, prompt)
    assert (answer.tokens[0], _num_cached(answer)) == (tokens, 0)
    away.rename(mesh.path)
    mesh.wait_listed()
    answer = _ask(mesh, prompt)
    assert (answer.tokens[0], _num_cached(answer)) == (tokens, 192)
    warnings = [line for line in mesh.prefills[0].lines if "No such file" in line]
    assert len(warnings) == 1, warnings
    Books(mesh)
