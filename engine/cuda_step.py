"""A step that a GPU computes: what is needed to make results of it once it is done.

Owns the pinned memory that its stamps come back in. Never launches anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.gpu_sampler import GpuSampler, PreparedRows
from engine.plan import Chunk, ChunkResult, PositionLogprobs
from engine.sampler import LogitsError
from engine.written import WrittenMark
from kernels.step_times import BEGIN, END, FORWARD, NUM_STAMPS


@dataclass(slots=True, kw_only=True)
class CudaStep:
    """A step on its way.

    graph_rows: of the graph it replays, 0 without one, None on a CPU. places: where on the device
    the token of each chunk is that samples one, else -1; prepared: its rows in the sampler, in
    order of the chunks that sample; prompt_logprobs: by number of chunk. written: where the device
    reports that the KV of the step, by its number there, is in the cache; None: it does not.
    """

    chunks: list[Chunk]
    places: list[int]
    prepared: list[PreparedRows]
    stamps: torch.Tensor
    done: torch.cuda.Event | None
    graph_rows: int | None
    prompt_logprobs: dict[int, tuple[PositionLogprobs, ...]] = field(default_factory=dict)
    written: WrittenMark | None = None
    number: int = 0

    @classmethod
    def of(
        cls,
        chunks: list[Chunk],
        places: list[int],
        prepared: list[PreparedRows],
        *,
        is_cuda: bool,
        graph_rows: int = 0,
    ) -> CudaStep:
        """A step whose stamps `record` is still to bring."""
        return cls(
            chunks=chunks,
            places=places,
            prepared=prepared,
            stamps=torch.empty(NUM_STAMPS, dtype=torch.int64, pin_memory=is_cuda),
            done=torch.cuda.Event() if is_cuda else None,
            graph_rows=graph_rows if is_cuda else None,
        )

    def record(self, stamps: torch.Tensor) -> None:
        """Enqueues the copy of the device's stamps, the last thing of the step."""
        self.stamps.copy_(stamps, non_blocking=True)
        if self.done is not None:
            self.done.record()

    @property
    def is_done(self) -> bool:
        """Whether everything has reached the host."""
        return self.done is None or self.done.query()

    def wait_written(self) -> bool:
        """Waits until its KV is in the cache; False if that is not known before it is done."""
        if self.written is None:
            return False
        return self.written.wait(self.number, lambda: self.is_done)

    @property
    def forward_s(self) -> float:
        """Seconds from the first kernel to the last norm, by the device's clock."""
        return (int(self.stamps[FORWARD]) - int(self.stamps[BEGIN])) / 1e9

    @property
    def sample_s(self) -> float:
        """Seconds of the head and sampling."""
        return (int(self.stamps[END]) - int(self.stamps[FORWARD])) / 1e9

    def results(self, sampler: GpuSampler) -> list[ChunkResult]:
        """One per chunk; waits. LogitsError if a row's logits hold NaN or +inf."""
        if self.done is not None:
            self.done.synchronize()
        sampled = iter([row for part in self.prepared for row in sampler.collect(part)])
        results: list[ChunkResult] = []
        for number, chunk in enumerate(self.chunks):
            row = next(sampled) if chunk.sample else ((), ())
            if isinstance(row, LogitsError):
                raise row
            token_ids, logprobs = row
            prompt_logprobs = self.prompt_logprobs.get(number, ())
            results.append(
                ChunkResult(token_ids=token_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
            )
        return results
