"""A store with a disk: more prefixes than memory holds, kept over a restart, never wrong."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.generate import Answer, generate, greedy_request
from tests.support.mesh import Mesh, running_mesh, wait_ready

NUM_TOKENS = 8
# Eight slots of 32 KiB; each prompt has three full blocks, and a private tail that needs a slot.
STORE_BYTES = "256KiB"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def disk_mesh(tiny_model: Path, directory: Path) -> Iterator[Mesh]:
    """One mesh for all tests; each has its own prompts and leaves a store that works."""
    flags = ("--disk-dir", str(directory), "--disk-bytes", "8MiB")
    with running_mesh(tiny_model, store_bytes=STORE_BYTES, store_flags=flags) as mesh:
        yield mesh


@pytest.fixture
def prompts(request: pytest.FixtureRequest) -> list[list[int]]:
    rng = random.Random(request.node.name)
    return [[rng.randrange(256) for _ in range(200)] for _ in range(6)]


def _ask(mesh: Mesh, prompt: list[int]) -> Answer:
    return generate(mesh, greedy_request(prompt, NUM_TOKENS))


def _num_cached(answer: Answer) -> int:
    assert answer.usage is not None
    return answer.usage.num_cached_tokens


def _on_disk(mesh: Mesh) -> int:
    return mesh.status(mesh.kvstores[0].address).counts.num_blocks_on_disk


def _fill(mesh: Mesh, prompts: list[list[int]]) -> list[list[int]]:
    """Asks every prompt once; each one's three blocks are on disk before the next is asked."""
    tokens: list[list[int]] = []
    for prompt in prompts:
        num_wanted = _on_disk(mesh) + 3
        answer = _ask(mesh, prompt)
        assert _num_cached(answer) == 0
        tokens.append(answer.tokens[0])
        mesh.wait_until(lambda n=num_wanted: _on_disk(mesh) >= n, "blocks reach the disk")
    return tokens


def _restart(mesh: Mesh, number: signal.Signals) -> None:
    store = mesh.kvstores[0]
    store.popen.send_signal(number)
    store.popen.wait(20)
    mesh.kvstores[0] = mesh.spawn_store(port=int(store.address.rsplit(":", 1)[1]))
    wait_ready(mesh.kvstores[0])


def _is_cached(mesh: Mesh, prompt: list[int], tokens: list[int]) -> bool:
    answer = _ask(mesh, prompt)
    assert answer.tokens[0] == tokens
    return _num_cached(answer) == 192


def test_prefixes_that_left_memory_come_from_disk(
    disk_mesh: Mesh, prompts: list[list[int]]
) -> None:
    tokens = _fill(disk_mesh, prompts)
    for prompt, expected in zip(prompts, tokens, strict=True):
        answer = _ask(disk_mesh, prompt)
        assert answer.tokens[0] == expected and _num_cached(answer) == 192


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restarted_store_serves_what_it_had_on_disk(
    disk_mesh: Mesh, prompts: list[list[int]], number: signal.Signals
) -> None:
    tokens = _fill(disk_mesh, prompts)
    _restart(disk_mesh, number)
    assert _on_disk(disk_mesh) >= 3 * len(tokens)
    for prompt, expected in zip(prompts, tokens, strict=True):
        disk_mesh.wait_until(lambda p=prompt, t=expected: _is_cached(disk_mesh, p, t), "a hit")


def test_flipped_bytes_on_disk_cost_only_recomputation(
    disk_mesh: Mesh, prompts: list[list[int]], directory: Path
) -> None:
    tokens = _fill(disk_mesh, prompts)
    disk_mesh.kvstores[0].popen.kill()
    paths = list(directory.glob("*.kv"))
    for path in paths:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    _restart(disk_mesh, signal.SIGKILL)
    assert len(paths) >= 3 * len(tokens)
    for prompt, expected in zip(prompts, tokens, strict=True):
        assert _ask(disk_mesh, prompt).tokens[0] == expected
        disk_mesh.wait_until(lambda p=prompt, t=expected: _is_cached(disk_mesh, p, t), "a hit")


def test_a_disk_that_takes_no_more_costs_only_recomputation(
    disk_mesh: Mesh, prompts: list[list[int]]
) -> None:
    tokens = _fill(disk_mesh, prompts)
    num_on_disk = _on_disk(disk_mesh)
    process = psutil.Process(disk_mesh.kvstores[0].popen.pid)
    process.rlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    other = [list(reversed(prompt)) for prompt in prompts]
    first = [_ask(disk_mesh, prompt).tokens for prompt in other]
    again = [_ask(disk_mesh, prompt).tokens for prompt in other]
    assert again == first
    assert _on_disk(disk_mesh) == num_on_disk
    for prompt, expected in zip(prompts, tokens, strict=True):
        answer = _ask(disk_mesh, prompt)
        assert answer.tokens[0] == expected and _num_cached(answer) == 192
    _restart(disk_mesh, signal.SIGTERM)
