"""What a rank pulls before a request is admitted: used whole or not at all, and never kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from protos import common_pb2, decode_pb2
from services.decode import prefetch as prefetch_module
from tests.services.decode.rank import HANDLE, NUM_BLOCKS, PROMPT, WAIT_S, Rank
from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rank")
    make_tiny_model("llama", path)
    return path


@pytest.fixture
async def rank(model: Path) -> AsyncIterator[Rank]:
    rank = Rank(model)
    yield rank
    await rank.worker.engine.close()
    await rank.engine_loop


@pytest.mark.parametrize("is_written_first", [True, False])
async def test_an_admission_uses_what_was_prefetched(rank: Rank, is_written_first: bool) -> None:
    rank.prefetch()
    await rank.store.asked.wait()
    assert all(rank.store.waits), "it did not wait for the writers"
    if not is_written_first:
        rank.admit()
    rank.store.written.set()
    if is_written_first:
        await asyncio.sleep(0)
        rank.admit()
    assert await rank.answer() == (len(PROMPT), 2)
    assert rank.store.num_pulls == 2, "more than the prefix and the tail of the prefetch"
    await rank.until_idle()
    assert rank.prefetches() == {"used": 1}


async def test_sequences_share_what_was_prefetched(rank: Rank) -> None:
    rank.store.written.set()
    rank.prefetch()
    rank.admit(sequences=[common_pb2.SequenceState(sequence_index=1, output_token_ids=[6])])
    assert (await rank.answer())[0] == len(PROMPT)
    assert rank.store.num_pulls == 2
    await rank.until_idle()


async def test_a_prefetch_that_brought_too_little_is_given_up_and_pulled_again(rank: Rank) -> None:
    rank.store.is_empty = True
    rank.store.written.set()
    rank.prefetch()
    await rank.store.asked.wait()
    async with asyncio.timeout(WAIT_S):
        while rank.num_free < NUM_BLOCKS:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
    rank.store.is_empty = False
    rank.admit()
    assert await rank.answer() == (len(PROMPT), 2)
    assert rank.store.num_pulls == 4
    await rank.until_idle()
    assert rank.prefetches() == {"wasted": 1}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"cache_salt": "another"}, id="salt"),
        pytest.param({"prompt_token_ids": [1]}, id="prompt"),
        pytest.param({"handoff": common_pb2.Handoff(tail_key=b"u" * 32)}, id="tail"),
    ],
)
async def test_what_another_prompt_pulled_is_not_used(rank: Rank, changes: dict[str, Any]) -> None:
    rank.store.written.set()
    rank.prefetch(**changes)
    rank.admit()
    assert await rank.answer() == (len(PROMPT), 2)
    assert rank.store.num_pulls > 2, "it was used"
    await rank.until_idle()


async def test_a_resume_uses_no_prefetch(rank: Rank) -> None:
    rank.store.written.set()
    rank.prefetch()
    admit = decode_pb2.Admit(
        handle=HANDLE,
        prompt_token_ids=PROMPT,
        sequences=[common_pb2.SequenceState(output_token_ids=[5, 6])],
        stopping=common_pb2.StoppingParams(max_new_tokens=3),
    )
    rank.session.command(decode_pb2.SessionRequest(admit=admit))
    num_pulled, num_tokens = await rank.answer()
    assert (num_pulled, num_tokens) == (128, 1)
    await rank.until_idle()
    assert rank.prefetches() == {"wasted": 1}


async def test_a_rank_without_spare_memory_takes_no_prefetch_and_still_admits(rank: Rank) -> None:
    held = rank.worker.pool.allocate(NUM_BLOCKS - 2)
    rank.prefetch()
    await asyncio.sleep(0)
    assert rank.store.num_pulls == 0 and rank.num_free == 2 and not rank.session.num_requests
    rank.admit()
    rank.worker.release(held)
    rank.store.written.set()
    assert await rank.answer() == (len(PROMPT), 2)
    await rank.until_idle()
    assert rank.prefetches() == {"refused": 1}


async def test_whoever_waits_for_memory_goes_before_a_prefetch(rank: Rank) -> None:
    held = rank.worker.pool.allocate(NUM_BLOCKS - 4)
    waiter = asyncio.ensure_future(rank.worker.engine.allocate(NUM_BLOCKS - 1))
    await asyncio.sleep(0)
    rank.prefetch()
    assert rank.num_free == 4, "it took memory that another waits for"
    rank.worker.release(held)
    rank.worker.release(await asyncio.wait_for(waiter, WAIT_S))
    await rank.until_idle()


@pytest.mark.parametrize("end", ["cancel", "cancel at once", "session", "expiry"])
async def test_a_prefetch_without_admission_ends_and_frees_its_blocks(
    rank: Rank, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if end == "expiry":
        monkeypatch.setattr(prefetch_module, "PREFETCH_S", 0.01)
    rank.prefetch()
    assert rank.num_free == NUM_BLOCKS - 3 and rank.session.num_requests == 1
    if end != "cancel at once":
        await rank.store.asked.wait()
    if end == "session":
        rank.session.close()
    elif end != "expiry":
        rank.cancel()
    await rank.until_idle()
    rank.store.written.set()
    rank.admit()  # late: it is served as if there had been no prefetch
    assert await rank.answer() == (len(PROMPT), 2)
    await rank.until_idle()


async def test_a_prefetch_that_is_over_and_not_admitted_is_freed(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch_module, "PREFETCH_S", 0.01)
    rank.store.written.set()
    rank.prefetch()
    await rank.until_idle()


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_an_admission_cancelled_with_its_prefetch_frees_both(
    rank: Rank, is_awaited: bool
) -> None:
    rank.prefetch()
    await rank.store.asked.wait()
    rank.admit()
    if is_awaited:
        await asyncio.sleep(0)
    rank.cancel()
    await rank.until_idle()


async def test_an_admission_that_is_refused_frees_its_prefetch(rank: Rank) -> None:
    rank.prefetch()
    rank.admit(fingerprint=b"another")
    message = await asyncio.wait_for(rank.session.next_message(), WAIT_S)
    assert message is not None and message.rejected[0].handle == HANDLE
    await rank.until_idle()


async def test_blocks_of_a_late_read_stay_in_quarantine(rank: Rank) -> None:
    rank.store.late = asyncio.get_running_loop().create_future()
    rank.prefetch()
    await rank.store.asked.wait()
    rank.cancel()
    async with asyncio.timeout(WAIT_S):
        while not rank.worker.pool.num_quarantined:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
    assert rank.num_free == NUM_BLOCKS - 3
    rank.store.late.set_result(None)
    await rank.until_idle()


@pytest.mark.parametrize(
    "changes",
    [{"fingerprint": b"another"}, {"prompt_token_ids": [1] * 10_000}],
    ids=["model", "length"],
)
async def test_a_prefetch_that_cannot_be_served_is_silently_refused(
    rank: Rank, changes: dict[str, Any]
) -> None:
    rank.prefetch(**changes)
    assert rank.num_free == NUM_BLOCKS and not rank.session.num_requests
    rank.store.written.set()
    rank.admit()
    assert await rank.answer() == (len(PROMPT), 2)
