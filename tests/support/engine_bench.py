"""An engine over a fake runner whose tokens follow from the tokens before them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.plan import Chunk, ChunkResult, SamplingParams, Step, StoppingParams
from engine.scheduler import DecodeScheduler, Scheduler
from engine.sequence import Sequence, SequenceState, StepItem, StepOutcome

BLOCK_TOKENS = 4


def next_token(tokens: list[int]) -> int:
    """The fake model: a hash of everything before."""
    state = 17
    for position, token in enumerate(tokens):
        state = (state * 31 + token * 7 + position) % 1_000_003
    return state % 50


def undisturbed(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeCache:
    """Slots of every block."""

    def __init__(self, num_blocks: int) -> None:
        self.slots = [[-1] * BLOCK_TOKENS for _ in range(num_blocks)]

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        for one, other in zip(src, dst, strict=True):
            self.slots[other] = list(self.slots[one])


@dataclass(frozen=True)
class FakeStep:
    results: list[ChunkResult]
    is_done: bool = True
    forward_s: float = 0.0
    sample_s: float = 0.0
    graph_rows: int | None = None
    is_written: bool = False

    def wait_written(self) -> bool:
        return self.is_written


class FakeRunner:
    """Writes tokens as KV and samples from what it reads back through the block table."""

    def __init__(self, num_blocks: int) -> None:
        self.cache = FakeCache(num_blocks)
        self.follows: list[list[int | None]] = []
        self.during_step: Callable[[], None] = lambda: None
        self.batch_lens: list[list[int]] = []
        self.step: dict[str, bool] = {}  # what its steps say of themselves
        self.failure: Exception | None = None  # of the next results

    def launch(self, chunks: list[Chunk], previous: Step | None) -> FakeStep:
        self.batch_lens.append([len(chunk.token_ids) for chunk in chunks])
        self.follows.append([chunk.follows for chunk in chunks])
        for chunk in chunks:
            token_ids = chunk.token_ids
            if chunk.follows is not None:
                assert isinstance(previous, FakeStep)
                token_ids = list(previous.results[chunk.follows].token_ids)
            for position, token in enumerate(token_ids, chunk.start):
                block = chunk.blocks[position // BLOCK_TOKENS]
                self.cache.slots[block][position % BLOCK_TOKENS] = token
        self.during_step()
        return FakeStep([self._sample(chunk) for chunk in chunks], **self.step)

    def results(self, step: Step) -> list[ChunkResult]:
        assert isinstance(step, FakeStep)
        if self.failure is not None:
            raise self.failure
        return step.results

    def _sample(self, chunk: Chunk) -> ChunkResult:
        if chunk.sample is None:
            return ChunkResult()
        length = chunk.start + len(chunk.token_ids)
        assert chunk.sample.position == length
        read = [slot for block in chunk.blocks for slot in self.cache.slots[block]][:length]
        return ChunkResult(token_ids=(next_token(read),) * len(chunk.sample.seeds))


class Bench:
    """An engine with its pool, runner and what it reported."""

    def __init__(self, num_blocks: int, scheduler: Scheduler) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_TOKENS)
        self.runner = FakeRunner(num_blocks)
        self.items: list[StepItem] = []
        self.failures: list[tuple[list[Sequence], BaseException]] = []
        self.after_step: Callable[[StepOutcome], None] = lambda outcome: None
        self.engine = Engine(
            self.runner,
            self.pool,
            scheduler,
            on_step=self._on_step,
            on_failure=self._on_failure,
        )
        self._moved = asyncio.Event()

    def _on_step(self, outcome: StepOutcome) -> None:
        self.items.extend(outcome.items)
        self.after_step(outcome)
        self._moved.set()

    def _on_failure(self, sequences: list[Sequence], error: BaseException) -> None:
        self.failures.append((sequences, error))
        self._moved.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a step, or its failure, has made condition true."""
        while not condition():
            self._moved.clear()
            await asyncio.wait_for(self._moved.wait(), 10)

    def on_loop_during_steps(self, act: Callable[[], None]) -> None:
        """Runs act on the loop while a step is in the engine thread."""
        loop = asyncio.get_running_loop()

        def during_step() -> None:
            done: concurrent.futures.Future[None] = concurrent.futures.Future()

            def run() -> None:
                try:
                    act()
                    done.set_result(None)
                except BaseException as error:
                    done.set_exception(error)

            loop.call_soon_threadsafe(run)
            done.result(10)

        self.runner.during_step = during_step


@contextlib.asynccontextmanager
async def running(num_blocks: int, scheduler: Scheduler | None = None) -> AsyncIterator[Bench]:
    bench = Bench(num_blocks, scheduler or DecodeScheduler(max_batch=8, chunk_tokens=8))
    loop = asyncio.ensure_future(bench.engine.run())
    try:
        yield bench
    finally:
        await bench.engine.close()
        await loop
        bench.engine.check()


def sequence(
    key: int, prompt: list[int], max_new_tokens: int = 5, priority: int = 0, **stopping: object
) -> Sequence:
    return Sequence(
        key=key,
        prompt_token_ids=prompt,
        seeds=(key,),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_new_tokens=max_new_tokens, **stopping),  # type: ignore[arg-type]
        priority=priority,
    )


def is_over(*sequences: Sequence) -> Callable[[], bool]:
    return lambda: all(s.state is SequenceState.FINISHED for s in sequences)
