"""Nothing leaks and nothing hangs: cancels, deadlines, dead peers, full and dead stores."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from protos import gateway_pb2
from tests.support.generate import (
    Answer,
    generate,
    generate_through_a_kill,
    greedy_request,
    sampled_request,
)
from tests.support.mesh import Mesh, running_mesh, wait_ready

NUM_REQUESTS = 2000
VOCAB_SIZE = 256


def _books(mesh: Mesh) -> list[tuple[object, ...]]:
    """What must return to its baseline, per process; sealed blocks are the cache and may stay."""
    books: list[tuple[object, ...]] = []
    for process in [*mesh.prefills, *mesh.decodes]:
        c = mesh.status(process.address).counts
        books.append((process.role, c.num_requests, c.num_sequences, c.num_blocks_used))
    for process in mesh.kvstores:
        c = mesh.status(process.address).counts
        books.append(("kvstore", c.num_leases, c.num_reservations, c.num_blocks_private))
    return books


def _loads(mesh: Mesh) -> list[tuple[int, int]]:
    """File descriptors and tasks per worker and store."""
    counts = [
        mesh.status(process.address).counts
        for process in [*mesh.prefills, *mesh.decodes, *mesh.kvstores]
    ]
    return [(c.num_fds, c.num_tasks) for c in counts]


def test_cancelled_requests_leave_nothing_behind(wide_mesh: Mesh) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 150))] for _ in range(40)]
    with ThreadPoolExecutor(16) as pool:  # warm-up: channels, threads and caches exist
        list(pool.map(lambda prompt: generate(wide_mesh, greedy_request(prompt, 4)), prompts))
    books, loads = _books(wide_mesh), _loads(wide_mesh)

    def run(index: int) -> None:
        request = sampled_request(prompts[index % len(prompts)], 2 + index % 9, seed=index)
        call = wide_mesh.generation.Generate(request, timeout=60)
        if index % 3 == 0:
            timer = threading.Timer(random.Random(index).random() * 0.08, call.cancel)
            timer.start()
        try:
            for _ in call:
                pass
        except grpc.RpcError as error:
            assert index % 3 == 0 and error.code() == grpc.StatusCode.CANCELLED, error

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, range(NUM_REQUESTS)))
    wide_mesh.wait_until(lambda: _books(wide_mesh) == books, f"books back at {books}")

    def settled() -> bool:
        now = _loads(wide_mesh)
        return all(f <= f0 + 2 and t <= t0 + 2 for (f, t), (f0, t0) in zip(now, loads, strict=True))

    wide_mesh.wait_until(settled, f"descriptors and tasks back at {loads}")


def test_a_deadline_stops_the_work(fresh_mesh: Mesh) -> None:
    call = fresh_mesh.generation.Generate(greedy_request([1, 2, 3], 900), timeout=0.3)
    with pytest.raises(grpc.RpcError) as raised:
        for _ in call:
            pass
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    decode = fresh_mesh.decodes[0].address
    fresh_mesh.wait_until(
        lambda: fresh_mesh.status(decode).counts.num_blocks_used == 0, "decode blocks freed"
    )
    assert len(generate(fresh_mesh, greedy_request([1, 2, 3], 5)).tokens[0]) == 5


def test_abort_ends_with_a_finished_message_and_usage(fresh_mesh: Mesh) -> None:
    request = greedy_request([5, 6, 7], 900)
    request.request_id = "to-abort"
    answer = Answer()
    for response in fresh_mesh.generation.Generate(request, timeout=60):
        answer.add(response)
        if len(answer.tokens.get(0, [])) >= 3 and not answer.finished:
            fresh_mesh.generation.Abort(gateway_pb2.AbortRequest(request_id="to-abort"))
    assert answer.finished[0].reason == 5 and answer.usage is not None
    assert len(answer.tokens[0]) < 900


def test_a_full_store_costs_only_recomputation(tiny_model: object) -> None:
    prompt = list(range(200))
    # Two slots of 32 KiB for a prompt of three full blocks and a tail.
    with running_mesh(tiny_model, store_bytes="64KiB") as small:  # type: ignore[arg-type]
        full = generate(small, greedy_request(prompt, 70))
        again = generate(small, greedy_request(prompt, 70))
        assert full.tokens[0] == again.tokens[0]
        assert again.usage is not None and again.usage.num_cached_tokens < 192
        assert small.status(small.kvstores[0].address).counts.num_blocks == 2
    with running_mesh(tiny_model) as roomy:  # type: ignore[arg-type]
        assert generate(roomy, greedy_request(prompt, 70)).tokens == full.tokens


def test_a_dead_store_costs_only_recomputation(fresh_mesh: Mesh) -> None:
    prompt = list(range(150))
    expected = generate(fresh_mesh, greedy_request(prompt, 20)).tokens
    store = fresh_mesh.kvstores[0]
    store.popen.kill()
    store.popen.wait()
    for _ in range(2):
        answer = generate(fresh_mesh, greedy_request(prompt, 20))
        assert answer.tokens == expected
        assert answer.usage is not None and answer.usage.num_cached_tokens == 0
    revived = fresh_mesh.spawn_store(port=int(store.address.rsplit(":", 1)[1]))
    fresh_mesh.kvstores[0] = revived
    wait_ready(revived)

    def cached() -> bool:
        again = generate(fresh_mesh, greedy_request(prompt, 20))
        assert again.tokens == expected
        return again.usage is not None and again.usage.num_cached_tokens == 128

    fresh_mesh.wait_until(cached, "the restarted store serves prefixes")


def test_a_killed_decode_rank_loses_and_doubles_no_token(wide_mesh: Mesh) -> None:
    prompt = list(range(100, 180))
    request = sampled_request(prompt, 400, seed=5)
    expected = generate(wide_mesh, request).tokens[0]
    answer = generate_through_a_kill(wide_mesh, request, after=30)
    assert answer.tokens[0] == expected
