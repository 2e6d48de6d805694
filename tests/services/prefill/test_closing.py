"""What prefill says before it has finished: only when a reader could begin to pull."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine.runner import ModelRunner
from engine.scheduler import PrefillScheduler
from mesh.errors import Internal
from mesh.kvstore_client import PullResult
from protos import common_pb2, prefill_pb2
from services.prefill.servicer import PrefillServicer
from services.worker import Worker
from services.worker_settings import WorkerSettings
from tests.mesh.fake_transfer import CopyTransfer, Network
from tests.support.tiny_models import make_tiny_model
from tests.support.toy_service import no_telemetry

CHUNK, PROMPT_LEN = 64, 200
TAIL_KEY = b"t" * 32


class Publishing:
    """Slots for everything, once `reserved` is set."""

    def __init__(self, reserved: asyncio.Event) -> None:
        self._reserved = reserved
        self.num_sent = 0

    async def reserve(self, deadline: object) -> None:
        await self._reserved.wait()

    async def send(
        self, first: int, block_ids: list[int], deadline: object, may_seal: asyncio.Future[bool]
    ) -> int:
        self.num_sent += len(block_ids)
        await asyncio.shield(may_seal)
        return len(block_ids)

    def close(self) -> None:
        pass


class Store:
    """Holds nothing yet and takes everything."""

    def __init__(self) -> None:
        self.reserved = asyncio.Event()
        self.publishes: list[Publishing] = []

    async def pull(self, *_: Any, **__: Any) -> PullResult:
        return PullResult(num_blocks=0, failures=())

    def publish(self, *_: Any, **__: Any) -> Publishing:
        self.publishes.append(Publishing(self.reserved))
        return self.publishes[-1]

    async def discard(self, keys: list[bytes]) -> None:
        pass


class Instance:
    """A prefill servicer over an engine that runs when told to; what it answers to one call."""

    def __init__(self, model: Path) -> None:
        self.worker = Worker(
            settings=WorkerSettings(model=model, chunk_tokens=CHUNK),
            runner=ModelRunner.load(model, device="cpu", dtype="fp32", num_blocks=8),
            scheduler=PrefillScheduler(max_batch=4, chunk_tokens=CHUNK),
            transfer=CopyTransfer(Network(), "worker", 1),  # type: ignore[arg-type]
            telemetry=no_telemetry(),
            incarnation="1",
            fingerprint=b"",
        )
        self.store = Store()
        self.worker.store = self.store  # type: ignore[assignment]
        self.servicer = PrefillServicer(self.worker)
        self.responses: list[prefill_pb2.PrefillResponse] = []
        self.progress: list[int] = []  # prompt tokens computed when each came
        self.num_steps = 0
        self.worker.listeners.append(self._on_step)

    async def prefill(self, max_new_tokens: int = 2) -> None:
        request = prefill_pb2.PrefillRequest(
            prompt_token_ids=[3 + i % 200 for i in range(PROMPT_LEN)],
            sequences=[common_pb2.SequenceState(seed=1)],
            stopping=common_pb2.StoppingParams(max_new_tokens=max_new_tokens),
            tail_key=TAIL_KEY,
        )
        async for response in self.servicer.Prefill(request, None):  # type: ignore[arg-type]
            (prompt,) = self.servicer._prompts.values()
            self.responses.append(response)
            self.progress.append(prompt._sequence.num_computed)
            for _ in range(20):  # until it is written out
                await asyncio.sleep(0)

    @property
    def events(self) -> list[str | None]:
        return [response.WhichOneof("event") for response in self.responses]

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.001)

    def _on_step(self, outcome: object) -> None:
        self.num_steps += 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prefill")
    make_tiny_model("llama", path)
    return path


async def test_it_closes_when_slots_are_reserved_and_the_last_chunk_is_launched(
    model: Path,
) -> None:
    instance = Instance(model)
    instance.store.reserved.set()
    call = asyncio.ensure_future(instance.prefill())
    await instance.until(lambda: instance.servicer._prompts and instance.responses)
    for _ in range(20):
        await asyncio.sleep(0)
    assert instance.events == ["started"], "it closed before anything was computed"
    loop = asyncio.ensure_future(instance.worker.engine.run())
    await asyncio.wait_for(call, 20)
    assert instance.events == ["started", "closing", "finished"]
    assert instance.progress[1] >= PROMPT_LEN - CHUNK
    closing, finished = instance.responses[1].closing, instance.responses[2].finished
    assert closing.handoff == finished.handoff and closing.handoff.tail_key == TAIL_KEY
    assert closing.handoff.num_tokens == PROMPT_LEN and len(closing.handoff.identity) == 32
    await instance.worker.engine.close()
    await loop


async def test_it_does_not_close_without_slots(model: Path) -> None:
    instance = Instance(model)
    loop = asyncio.ensure_future(instance.worker.engine.run())
    call = asyncio.ensure_future(instance.prefill())
    await instance.until(lambda: instance.num_steps == 4)
    for _ in range(20):
        await asyncio.sleep(0)
    assert instance.events == ["started"]
    instance.store.reserved.set()
    await asyncio.wait_for(call, 20)
    assert instance.events == ["started", "closing", "finished"]
    await instance.worker.engine.close()
    await loop


async def test_a_prompt_that_nobody_decodes_is_not_announced(model: Path) -> None:
    instance = Instance(model)
    instance.store.reserved.set()
    loop = asyncio.ensure_future(instance.worker.engine.run())
    await asyncio.wait_for(instance.prefill(max_new_tokens=1), 20)
    assert instance.events == ["started", "finished"]
    assert not instance.responses[1].finished.handoff.tail_key
    await instance.worker.engine.close()
    await loop


async def test_blocks_that_a_failed_step_freed_do_not_leave(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = Instance(model)
    runner = instance.worker.runner
    compute = runner.results

    def results(step: Any) -> Any:
        if instance.num_steps == 1:
            raise RuntimeError("NaN")
        return compute(step)

    monkeypatch.setattr(runner, "results", results)
    loop = asyncio.ensure_future(instance.worker.engine.run())
    call = asyncio.ensure_future(instance.prefill())
    pool, engine = instance.worker.pool, instance.worker.engine
    await instance.until(lambda: engine.num_steps == 2 and pool.num_free == pool.num_blocks)
    instance.store.reserved.set()  # only now do the blocks of the first step have slots
    with pytest.raises(Internal, match="NaN"):
        await asyncio.wait_for(call, 20)
    assert [publish.num_sent for publish in instance.store.publishes] == [0, 0]
    await instance.worker.engine.close()
    await loop
