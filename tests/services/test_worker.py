"""A worker's memory around pulls: what a late READ may still write is never handed on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine.runner import ModelRunner
from engine.scheduler import DecodeScheduler
from mesh.kvstore_client import PullResult
from services.worker import Worker
from services.worker_settings import WorkerSettings
from tests.mesh.fake_transfer import CopyTransfer, Network
from tests.support.tiny_models import make_tiny_model
from tests.support.toy_service import no_telemetry


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker")
    make_tiny_model("llama", path)
    return path


class LateStore:
    """Brings the first block; the second stays under a READ that is late."""

    def __init__(self) -> None:
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def pull(self, keys: Any, blocks: list[int], *, hold: Any, **_: Any) -> Any:
        hold([blocks[1]], self.settled)
        return PullResult(num_blocks=1, failures=("timeout",))

    async def close(self) -> None:
        pass


async def test_blocks_from_the_first_late_one_on_leave_the_request_without_waiting(
    model: Path,
) -> None:
    runner = ModelRunner.load(model, device="cpu", dtype="fp32", num_blocks=4)
    worker = Worker(
        settings=WorkerSettings(model=model),
        runner=runner,
        scheduler=DecodeScheduler(max_batch=4, chunk_tokens=16),
        transfer=CopyTransfer(Network(), "worker", 1),  # type: ignore[arg-type]
        telemetry=no_telemetry(),
        incarnation="1",
        fingerprint=b"",
    )
    store = LateStore()
    worker.store = store  # type: ignore[assignment]
    blocks = worker.pool.allocate(4)  # all there is: waiting for a fresh block would never end
    kept = blocks[0]
    pulled, has_tail = await worker.pull([b"a", b"b", b"c"], blocks)
    assert (pulled.num_blocks, has_tail) == (1, False)
    assert blocks == [kept]
    assert worker.pool.num_free == 2 and worker.pool.num_quarantined == 1
    store.settled.set_result(None)
    fresh = await asyncio.wait_for(worker.engine.allocate(3), 10)
    assert worker.pool.num_quarantined == 0
    worker.release([*blocks, *fresh])
    worker.pool.check()
