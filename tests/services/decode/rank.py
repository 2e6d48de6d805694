"""A rank's session over a real engine and a store that a test answers for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from engine.runner import ModelRunner
from engine.scheduler import DecodeScheduler
from kv.block import prefix_identity
from mesh.kvstore_client import PullResult
from protos import common_pb2, decode_pb2
from services.decode.session import Session
from services.worker import Worker
from services.worker_settings import WorkerSettings
from tests.mesh.fake_transfer import CopyTransfer, Network
from tests.support.meters import Meters

NUM_BLOCKS = 8
PROMPT = list(range(100, 230))  # two blocks of 64 tokens, and a tail
TAIL_KEY = b"t" * 32
HANDLE = 7
WAIT_S = 20.0


class Store:
    """Answers pulls when told to, with all blocks or none; a late READ may still write some."""

    def __init__(self) -> None:
        self.num_pulls = 0
        self.waits: list[bool] = []
        self.is_empty = False
        self.written = asyncio.Event()
        self.asked = asyncio.Event()
        self.late: asyncio.Future[None] | None = None

    async def pull(
        self, keys: Any, blocks: list[int], *, hold: Any, waits_for_writers: bool, **_: Any
    ) -> PullResult:
        self.num_pulls += 1
        self.waits.append(waits_for_writers)
        self.asked.set()
        try:
            await self.written.wait()
        except asyncio.CancelledError:
            if self.late is not None:
                hold(blocks, self.late)
            raise
        num_blocks = 0 if self.is_empty else len(keys)
        return PullResult(num_blocks=num_blocks, failures=())

    async def put(self, *_: Any, **__: Any) -> int:
        return 0


class Rank:
    """A session over an engine that runs, and what a gateway says to it."""

    def __init__(self, model: Path) -> None:
        self.meters = Meters()
        self.worker = Worker(
            settings=WorkerSettings(model=model),
            runner=ModelRunner.load(model, device="cpu", dtype="fp32", num_blocks=NUM_BLOCKS),
            scheduler=DecodeScheduler(max_batch=4, chunk_tokens=256),
            transfer=CopyTransfer(Network(), "worker", 1),  # type: ignore[arg-type]
            telemetry=self.meters.telemetry,
            incarnation="1",
            fingerprint=b"f",
        )
        self.store = Store()
        self.worker.store = self.store  # type: ignore[assignment]
        self.session = Session(self.worker, 1)
        self.worker.listeners.append(self._on_step)
        self.engine_loop = asyncio.ensure_future(self.worker.engine.run())

    def _on_step(self, outcome: Any) -> None:
        for item in outcome.items:
            self.session.on_item(item)
        self.session.flush()

    def prefetches(self) -> dict[str, float]:
        """What came of those so far."""
        totals = self.meters.totals("kvmesh.kv.prefetches")
        return {result: total for (result,), total in totals.items()}

    @property
    def num_free(self) -> int:
        return self.worker.pool.num_free

    def handoff(self) -> common_pb2.Handoff:
        root = self.worker.root("")
        identity = prefix_identity(root, PROMPT, self.worker.block_tokens)
        return common_pb2.Handoff(tail_key=TAIL_KEY, num_tokens=len(PROMPT), identity=identity)

    def prefetch(self, **changes: Any) -> None:
        command = decode_pb2.Prefetch(
            handle=HANDLE, prompt_token_ids=PROMPT, handoff=self.handoff(), fingerprint=b"f"
        )
        command.MergeFrom(decode_pb2.Prefetch(**changes))
        self.session.command(decode_pb2.SessionRequest(prefetch=command))
        self.check()

    def admit(self, **changes: Any) -> None:
        state = common_pb2.SequenceState(output_token_ids=[5], seed=1)
        stopping = common_pb2.StoppingParams(max_new_tokens=3)
        admit = decode_pb2.Admit(
            handle=HANDLE, prompt_token_ids=PROMPT, sequences=[state], stopping=stopping,
            sampling=common_pb2.SamplingParams(temperature=0.0), handoff=self.handoff(),
        )  # fmt: skip
        admit.MergeFrom(decode_pb2.Admit(**changes))
        self.session.command(decode_pb2.SessionRequest(admit=admit))
        self.check()

    def cancel(self) -> None:
        self.session.command(decode_pb2.SessionRequest(cancel=decode_pb2.Cancel(handle=HANDLE)))
        self.check()

    async def answer(self) -> tuple[int, int]:
        """Reads until the request has ended: tokens pulled, and tokens generated."""
        num_pulled, num_tokens = -1, 0
        while True:
            message = await asyncio.wait_for(self.session.next_message(), WAIT_S)
            assert message is not None and not message.rejected, message
            for admitted in message.admitted:
                num_pulled = admitted.num_pulled_tokens
            for output in message.outputs:
                num_tokens += len(output.token_ids)
                if output.finish_reason:
                    return num_pulled, num_tokens

    async def until_idle(self) -> None:
        """Waits until nothing is held for the request; looks at the books every time."""
        async with asyncio.timeout(WAIT_S):
            while self.num_free < NUM_BLOCKS or self.session.num_requests:
                self.check()
                await asyncio.sleep(0.001)
        self.check()

    def check(self) -> None:
        self.session.check()
        self.worker.engine.check()
