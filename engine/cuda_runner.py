"""Runs steps on one GPU: enqueues them and answers later, without waiting in between.

Owns decoder, cache, sampler and static buffers of a process. A step of single output tokens is one
CUDA graph; any other step runs the same kernels one by one. Never decides what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from engine.config import ModelConfig
from engine.cuda_forward import CudaForward
from engine.cuda_graphs import GraphBuckets, GraphPool, bucket_sizes
from engine.cuda_step import CudaStep
from engine.decoder import Decoder
from engine.gpu_sampler import GpuSampler
from engine.kv_cache import KvCache
from engine.loading import Precision
from engine.plan import Chunk, ChunkResult, PositionLogprobs, Step
from engine.prompt_graphs import PromptGraphs, prompt_sizes
from engine.ragged import Pass, padded
from kernels import ops
from kernels.step_times import BEGIN, END, FORWARD, NUM_STAMPS

_LOGPROB_ROWS = 64


class CudaRunner:
    """Decoder + cache + sampler; `context_len` is what model and cache can hold, in tokens."""

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        cache: KvCache,
        precision: Precision,
        *,
        max_batch: int,
        chunk_tokens: int,
        pdl: bool = True,
        graphs: bool = True,
        tables: ops.TileTables | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """max_batch, chunk_tokens: the largest step; graphs, pdl: see GraphBuckets and Batch."""
        self.config, self.decoder, self.cache = config, decoder, cache
        self.precision, self.layout = precision, cache.layout
        self._pdl = pdl
        device = cache.storage.device
        self._is_cuda = device.type == "cuda"
        sizes = bucket_sizes(max_batch)
        self._max_decode = padded(sizes[-1])
        self._sampler = GpuSampler(config.vocab_size, self._max_decode, device)
        self._forward = CudaForward(
            config,
            decoder,
            cache,
            max_decode=self._max_decode,
            sampled=self._sampler.tokens,
            pdl=pdl,
            tables=tables,
        )
        self.context_len = self._forward.context_len
        self._rows = self._forward.row_inputs()
        self._stamps = torch.zeros(NUM_STAMPS, dtype=torch.int64, device=device)
        with torch.inference_mode():
            self._forward.warm_up(chunk_tokens)
            pool = GraphPool(device)
            self._prompts = self._capture_prompts(chunk_tokens, pool, progress) if graphs else None
            self._graphs = self._capture_decode(sizes, pool, progress) if graphs else None

    def step(self, chunks: list[Chunk]) -> list[ChunkResult]:
        """Computes every chunk; one result per chunk, in order."""
        return self.results(self.launch(chunks, None))

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], previous: Step | None) -> CudaStep:
        """Enqueues every chunk.

        Chunks that do not fit their blocks or the context are a ValueError, before anything runs.
        """
        self._forward.check(chunks)
        assert previous is None or isinstance(previous, CudaStep), "a step of another runner"
        before = previous.places if previous is not None else ()
        if self._fits_graph(chunks):
            step = self._launch_rows(chunks, before)
        else:
            step = self._launch_chunks(chunks, before)
        step.record(self._stamps)
        return step

    def results(self, step: Step) -> list[ChunkResult]:
        """One result per chunk of a step of this runner, in order; waits for it.

        LogitsError if a row's logits hold NaN or +inf.
        """
        assert isinstance(step, CudaStep), "a step of another runner"
        return step.results(self._sampler)

    @torch.inference_mode()
    def hidden_states(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        """As `step` without sampling: per chunk [num_tokens, hidden_size] after the last norm."""
        self._forward.check(chunks)
        parts: list[list[torch.Tensor]] = [[] for _ in chunks]
        for part, hidden in self._passes(chunks, (), self._forward.written.next_step()):
            for span, row in part.places():
                parts[span.chunk].append(hidden[row : row + span.stop - span.start])
        return [torch.cat(part) for part in parts]

    def _capture_prompts(
        self, chunk_tokens: int, pool: GraphPool, progress: Callable[[str], None]
    ) -> PromptGraphs | None:
        """Before decode steps, which need less, see GraphBuckets. None for FP8 pages, whose prefill
        takes memory by the length of the prompts.
        """
        if self.cache.pages.scales is not None:
            return None
        sizes = prompt_sizes(chunk_tokens)
        inputs = self._forward.prompt_inputs(sizes[-1])
        hidden = torch.empty(
            sizes[-1],
            self.config.hidden_size,
            dtype=self.decoder.dtype,
            device=self.cache.storage.device,
        )
        forward = functools.partial(self._forward.prompt_rows, inputs)
        return PromptGraphs(sizes, inputs, forward, hidden, pool, progress)

    def _capture_decode(
        self, sizes: list[int], pool: GraphPool, progress: Callable[[str], None]
    ) -> GraphBuckets:
        return GraphBuckets("decode steps", sizes, self._enqueue_rows, pool, progress)

    def _fits_graph(self, chunks: list[Chunk]) -> bool:
        """Single output tokens, one seed each."""
        return (
            self._graphs is not None
            and 0 < len(chunks) <= self._graphs.largest
            and all(
                chunk.start >= chunk.prompt_len
                and len(chunk.token_ids) == 1
                and chunk.sample is not None
                and len(chunk.sample.seeds) == 1
                for chunk in chunks
            )
        )

    def _launch_rows(self, chunks: list[Chunk], before: Sequence[int]) -> CudaStep:
        """A step of single output tokens, by its graph."""
        assert self._graphs is not None
        size = self._graphs.size_for(len(chunks))
        rows = self._rows.send(chunks, before, size)
        prepared = self._sampler.prepare([c.sample for c in chunks if c.sample], rows)
        self._sampler.send(prepared)
        self._graphs.replay(size)
        self._sampler.fetch(prepared)
        return CudaStep.of(
            chunks, list(prepared.places), [prepared], is_cuda=self._is_cuda, graph_rows=size
        )

    def _enqueue_rows(self, num_rows: int) -> None:
        """The kernels of a step over the first num_rows rows of the static inputs."""
        ops.stamp(self._stamps, BEGIN)
        hidden = self._forward.rows(self._rows, num_rows)
        ops.stamp(self._stamps, FORWARD, pdl=self._pdl)
        logits = self.decoder.logits(hidden, pdl=self._pdl)
        self._sampler.launch(logits, num_rows, pdl=self._pdl)
        ops.stamp(self._stamps, END, pdl=self._pdl)

    def _launch_chunks(self, chunks: list[Chunk], before: Sequence[int]) -> CudaStep:
        """A step of any chunks, kernel by kernel."""
        ops.stamp(self._stamps, BEGIN)
        number = self._forward.written.next_step()
        hidden = self._hidden(chunks, before, number)
        ops.stamp(self._stamps, FORWARD, pdl=self._pdl)
        step = CudaStep.of(chunks, [-1] * len(chunks), [], is_cuda=self._is_cuda)
        step.written, step.number = self._forward.written, number
        for part in self._sample_parts(chunks):
            logits = self.decoder.logits(
                torch.stack([hidden[number][-1] for number in part]), pdl=self._pdl
            )
            rows = [sample for number in part if (sample := chunks[number].sample)]
            prepared = self._sampler.prepare(rows)
            self._sampler.send(prepared)
            self._sampler.launch(logits, prepared.num_rows, pdl=self._pdl)
            self._sampler.fetch(prepared)
            step.prepared.append(prepared)
            step.places[:] = [-1] * len(chunks)  # tokens of the last launch only stay
            for number, place in zip(part, prepared.places, strict=True):
                step.places[number] = place
        ops.stamp(self._stamps, END, pdl=self._pdl)
        for number, chunk in enumerate(chunks):
            if chunk.prompt_logprobs is not None:
                logprobs = self._prompt_logprobs(chunk, hidden[number])
                step.prompt_logprobs[number] = logprobs
        return step

    def _sample_parts(self, chunks: list[Chunk]) -> list[list[int]]:
        """The chunks that sample, in parts of at most as many seeds as the sampler has rows."""
        parts: list[list[int]] = []
        room = 0
        for number, chunk in enumerate(chunks):
            if chunk.sample is None:
                continue
            num_seeds = len(chunk.sample.seeds)
            if num_seeds > room:
                parts.append([])
                room = self._max_decode
            parts[-1].append(number)
            room -= num_seeds
        return parts

    def _passes(
        self, chunks: list[Chunk], before: Sequence[int], number: int
    ) -> Iterator[tuple[Pass, torch.Tensor]]:
        """Enqueues the passes of a step, number as `WrittenMark` counts it; hidden states
        [num_rows, hidden_size].
        """
        parts = self._forward.passes(chunks)
        for part in parts:
            self._forward.written.begin(number, is_last=part is parts[-1])
            if self._prompts is not None and self._prompts.fits(part):
                yield part, self._prompts.run(chunks, part, before)
            else:
                yield part, self._forward.one_pass(chunks, part, before)

    def _hidden(
        self, chunks: list[Chunk], before: Sequence[int], number: int
    ) -> dict[int, torch.Tensor]:
        """By chunk: hidden states of its last row, or of all rows for prompt logprobs."""
        hidden: dict[int, torch.Tensor] = {}
        for part, states in self._passes(chunks, before, number):
            for span, row in part.places():
                stop = row + span.stop - span.start
                if chunks[span.chunk].prompt_logprobs is None:
                    hidden[span.chunk] = states[stop - 1 : stop]
                elif span.chunk in hidden:
                    hidden[span.chunk] = torch.cat((hidden[span.chunk], states[row:stop]))
                else:
                    hidden[span.chunk] = states[row:stop]
        return hidden

    def _prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> tuple[PositionLogprobs, ...]:
        """Waits for the device."""
        assert chunk.prompt_logprobs is not None
        results: list[PositionLogprobs] = []
        for start in range(0, len(chunk.next_token_ids), _LOGPROB_ROWS):
            token_ids = chunk.next_token_ids[start : start + _LOGPROB_ROWS]
            logits = self.decoder.logits(hidden[start : start + len(token_ids)])
            results += self._sampler.prompt_logprobs(logits, token_ids, chunk.prompt_logprobs)
        return tuple(results)
