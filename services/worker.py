"""What a prefill and a decode process have in common: model, engine, NIXL agent and store client.

Owns construction, teardown and the life of blocks that a late transfer may still write. Never
routes, never speaks to clients. The gateway and the kvstore never import it (it loads torch).
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from engine.block_pool import BlockPool
from engine.cuda_runner import CudaRunner
from engine.engine import Engine
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.sequence import Sequence as EngineSequence
from engine.sequence import StepOutcome
from kv.block import salted_root
from kv.nixl_transfer import NixlTransfer
from mesh.discovery import Discovery
from mesh.errors import FailedPrecondition, invalid
from mesh.kvstore_client import KvStoreClient, PullResult
from mesh.kvstore_shards import each
from mesh.process import num_fds, rss_num_bytes, task_count
from mesh.status import Rate
from mesh.telemetry import Telemetry
from protos import status_pb2
from services.worker_gauges import observe_worker
from services.worker_model import fingerprint_of, load_model
from services.worker_settings import WorkerSettings

T = TypeVar("T")

PULL_DEADLINE_S = 10.0
PUBLISH_DEADLINE_S = 10.0


class Worker:
    """Model, engine, NIXL agent and store client of one worker process.

    Build with `start`; `close` stops the engine, then the client, then NIXL.
    """

    def __init__(
        self,
        *,
        settings: WorkerSettings,
        runner: ModelRunner | CudaRunner,
        scheduler: Scheduler,
        transfer: NixlTransfer,
        telemetry: Telemetry,
        incarnation: str,
        fingerprint: bytes,
    ) -> None:
        self.settings = settings
        self.runner = runner
        self.telemetry = telemetry
        self.incarnation, self.fingerprint = incarnation, fingerprint
        self.block_tokens = runner.layout.block_tokens
        self.pool = BlockPool(runner.cache.num_blocks, self.block_tokens)
        self.listeners: list[Callable[[StepOutcome], None]] = []
        self.reporters: list[Callable[[status_pb2.InstanceStatus], None]] = []
        self.failure_listeners: list[Callable[[Sequence[EngineSequence], BaseException], None]] = []
        self.engine = Engine(
            runner, self.pool, scheduler, on_step=self._on_step, on_failure=self._on_failure
        )
        self._transfer = transfer
        self.store = KvStoreClient(
            transfer=transfer,
            block_num_bytes=runner.layout.num_bytes,
            incarnation=incarnation,
            digest=self._digest,
            telemetry=telemetry,
            path=settings.kv_path,
        )
        observe_worker(telemetry, self.engine, self.store, runner.cache.storage.device)
        self._discovery = Discovery(settings.kvstore)
        # Digests and tails of blocks no step writes any more: beside the engine thread, not in it.
        self._settled = ThreadPoolExecutor(1, thread_name_prefix="kv-settled")
        self._rate = Rate()
        self._num_tokens = 0
        self._started_at = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        *,
        settings: WorkerSettings,
        role: str,
        scheduler: Callable[[WorkerSettings], Scheduler],
        telemetry: Telemetry,
        incarnation: str,
        progress: Callable[[str], None],
    ) -> Worker:
        """Loads the model off the loop, registers the cache with NIXL, connects to the stores."""
        loop = asyncio.get_running_loop()
        torch.set_num_threads(settings.num_threads)
        runner = await loop.run_in_executor(None, load_model, settings, progress)
        fingerprint = await loop.run_in_executor(None, fingerprint_of, settings, runner)
        transfer = NixlTransfer.create(
            role=role,
            incarnation=incarnation,
            arena=(runner.cache.address, runner.cache.num_bytes),
            device_id=runner.cache.device_id,
            on_thread_start=runner.cache.make_current,
            loop=loop,
        )
        worker = cls(
            settings=settings,
            runner=runner,
            scheduler=scheduler(settings),
            transfer=transfer,
            telemetry=telemetry,
            incarnation=incarnation,
            fingerprint=fingerprint,
        )
        await worker._discovery.start(worker.store.follow)
        await worker.store.start()
        return worker

    async def close(self) -> None:
        """Stops everything; blocks under late transfers stay untouched until the process ends."""
        await self.engine.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._discovery.close()
        await self.store.close()
        self._transfer.close()
        self._settled.shutdown(wait=False)

    def root(self, cache_salt: str) -> bytes:
        """Root of the block names under this tenant's salt."""
        return salted_root(self.fingerprint, cache_salt)

    def check_request(self, fingerprint: bytes, prompt_len: int) -> None:
        """Refuses another model's request and prompts that this worker cannot hold."""
        if fingerprint and fingerprint != self.fingerprint:
            raise FailedPrecondition(
                f"fingerprint {fingerprint.hex()[:16]} is not this worker's "
                f"{self.fingerprint.hex()[:16]}: model, dtype or layout differ",
                reason="FINGERPRINT_MISMATCH",
            )
        limit = self.runner.context_len
        if not 0 < prompt_len <= limit:
            raise invalid(
                "prompt_token_ids", f"{prompt_len} tokens; this worker holds 1 to {limit}"
            )

    async def pull(
        self,
        keys: list[bytes],
        blocks: list[int],
        tail_key: bytes = b"",
        *,
        waits_for_writers: bool = False,
    ) -> tuple[PullResult, bool]:
        """Pulls the longest sealed prefix of keys into `blocks`, and a private tail into the block
        behind them; the store drops the tail then. What came, and whether the tail did.

        waits_for_writers: what is still being written is waited for, a second at most.
        Blocks that a late READ may still write are quarantined; `blocks` ends before the first.
        """
        held: list[int] = []
        results = [PullResult(num_blocks=0, failures=())] * 2

        async def pull(number: int, names: list[bytes], targets: list[int]) -> None:
            results[number] = await self.store.pull(
                names,
                targets,
                deadline_s=PULL_DEADLINE_S,
                hold=self._holder(held),
                waits_for_writers=waits_for_writers,
            )

        whole = len(keys)
        tail = [pull(1, [tail_key], blocks[whole : whole + 1])] if tail_key else []
        await each([pull(0, keys, blocks[:whole]), *tail])
        self._drop_held(blocks, held)
        return results[0], results[1].num_blocks == 1

    def quarantine(self, block_ids: list[int], settled: asyncio.Future[None]) -> None:
        """Keeps blocks from reuse until the transfer that may write them is over."""
        self.pool.quarantine(block_ids)

        async def release() -> None:
            await asyncio.wait([settled])
            self.pool.unquarantine(block_ids)
            self.engine.wake()

        self.spawn(release())

    def release(self, block_ids: list[int]) -> None:
        """Gives one reference to each block back and wakes whoever waits for memory."""
        self.pool.free(block_ids)
        self.engine.wake()

    async def on_settled(self, fn: Callable[..., T], *args: object) -> T:
        """Runs fn(*args) over blocks that no step in flight writes, while steps compute."""
        return await asyncio.get_running_loop().run_in_executor(self._settled, fn, *args)

    def spawn(
        self, coroutine: Coroutine[None, None, None], context: contextvars.Context | None = None
    ) -> None:
        """Runs background work that `close` waits for, in the caller's context or in another."""
        task = asyncio.get_running_loop().create_task(coroutine, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def count_tokens(self, num_tokens: int) -> None:
        """Adds generated tokens to the status figures."""
        self._num_tokens += num_tokens
        self._rate.add(num_tokens)

    def status(
        self, role: status_pb2.Role, address: str, num_requests: int, ready: bool
    ) -> status_pb2.InstanceStatus:
        """The present state, for StatusService."""
        config, pool = self.runner.config, self.pool
        status = status_pb2.InstanceStatus(
            role=role,
            address=address,
            incarnation=self.incarnation,
            ready=ready,
            detail=self.store.detail,
            model=status_pb2.WorkerModel(
                name=self.settings.model_name or self.settings.model.resolve().name,
                architecture=config.architecture,
                context_len=self.runner.context_len,
                vocab_size=config.vocab_size,
                fingerprint=self.fingerprint,
                block_tokens=self.block_tokens,
                eos_token_ids=sorted(config.eos_token_ids),
            ),
            counts=status_pb2.Counts(
                num_requests=num_requests,
                num_sequences=self.engine.num_running + self.engine.num_waiting,
                num_waiting=self.engine.num_waiting,
                num_blocks=pool.num_blocks,
                num_blocks_used=pool.num_blocks - pool.num_free - pool.num_quarantined,
                num_blocks_quarantined=pool.num_quarantined,
                num_tasks=task_count(),
                num_fds=num_fds(),
                num_tokens=self._num_tokens,
                tokens_per_s=self._rate.per_s(),
                num_steps=self.engine.num_steps,
                rss_num_bytes=rss_num_bytes(),
            ),
            uptime_s=time.monotonic() - self._started_at,
        )
        for report in self.reporters:
            report(status)
        return status

    def _holder(self, held: list[int]) -> Callable[[list[int], asyncio.Future[None]], None]:
        """Quarantines what a late READ may still write, and notes it in `held`."""

        def hold(block_ids: list[int], settled: asyncio.Future[None]) -> None:
            held.extend(block_ids)
            self.quarantine(block_ids, settled)

        return hold

    def _drop_held(self, blocks: list[int], held: list[int]) -> None:
        """Cuts `blocks` before the first one held: what follows is allocated again by the engine.

        Waiting here for others, while holding the rest, could block two requests for ever.
        """
        if held:
            first = min(blocks.index(block) for block in held)
            dropped = blocks[first:]
            del blocks[first:]
            self.release(dropped)

    async def _digest(self, block_ids: list[int]) -> list[int]:
        return await self.on_settled(self.runner.cache.digest, block_ids)

    def _on_step(self, outcome: StepOutcome) -> None:
        for listener in self.listeners:
            listener(outcome)

    def _on_failure(self, sequences: Sequence[EngineSequence], error: BaseException) -> None:
        for listener in self.failure_listeners:
            listener(sequences, error)
