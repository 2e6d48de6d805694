"""Runs one step on tensors: chunks in, results out. Called in the engine thread only.

Owns decoder, cache and sampler of a process; never decides what runs and knows no request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.attention import GroupAttention
from engine.batch import Batch
from engine.config import ModelConfig
from engine.decoder import Decoder
from engine.kv_cache import KvCache
from engine.loading import Precision, block_layout, load_decoder_and_cache
from engine.memory import MemoryNeeds, plan_memory, weights_num_bytes
from engine.plan import Chunk, ChunkResult, PositionLogprobs, Step
from engine.sampler import Sampler
from kernels import ops

# Rows of logits at a time for prompt_logprobs: [rows, vocab_size] fp32 stays small.
_LOGPROB_ROWS = 64
# fp32 values of KV that one group of decoding sequences reads at a time (8 MiB).
_GROUP_SIZE = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedStep:
    """A step that was computed while it was launched."""

    results: list[ChunkResult]
    forward_s: float
    sample_s: float

    @property
    def is_done(self) -> bool:
        """Always."""
        return True

    def wait_written(self) -> bool:
        """It is, and nobody waited for it."""
        return False

    @property
    def graph_rows(self) -> int | None:
        """A CPU has no graphs."""
        return None


class ModelRunner:
    """Decoder + cache + sampler; `context_len` is what model and cache can hold, in tokens."""

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        cache: KvCache,
        sampler: Sampler,
        precision: Precision,
    ) -> None:
        self.config = config
        self.precision = precision
        self.cache = cache
        self.layout = cache.layout
        self.context_len = min(config.context_len, cache.num_blocks * cache.layout.block_tokens)
        self._decoder = decoder
        self._sampler = sampler
        self._device = cache.storage.device
        self._num_query_heads = config.num_heads // config.num_kv_heads
        self._wide_rows = ops.exact_rows(
            self._num_query_heads, config.head_dim, self.layout.block_tokens, self._device
        )
        # Pages of the group at work, never more than _GROUP_SIZE or one sequence needs.
        size = max(_GROUP_SIZE, ops.scratch_size(1, cache.num_blocks, cache.blocks))
        self._scratch = torch.empty(size, dtype=torch.float32, device=self._device)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        load_format: str = "auto",
        block_tokens: int = 64,
        kv_bytes: int | None = None,
        num_blocks: int | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> ModelRunner:
        """Loads a model directory; ModelError or ValueError says what does not fit.

        Either kv_bytes or num_blocks sizes the cache; progress gets a line per step of loading.
        """
        config, target = ModelConfig.load(model_dir), torch.device(device)
        precision = Precision.resolve(config, dtype=dtype, kv_dtype=kv_dtype, device=target)
        layout = block_layout(config, block_tokens, precision.kv_dtype)
        weights = weights_num_bytes(config, precision.weight_format, precision.dtype)
        plan = plan_memory(
            MemoryNeeds(weights=weights),
            block_num_bytes=layout.num_bytes,
            block_tokens=block_tokens,
            kv_bytes=kv_bytes,
            num_blocks=num_blocks,
        )
        decoder, cache = load_decoder_and_cache(
            model_dir,
            config,
            precision,
            plan,
            layout=layout,
            device=target,
            load_format=load_format,
            progress=progress,
        )
        return cls(config, decoder, cache, Sampler(config.vocab_size, target), precision)

    def step(self, chunks: list[Chunk]) -> list[ChunkResult]:
        """Computes every chunk in one ragged batch; one result per chunk, in order."""
        return self.results(self.launch(chunks, None))

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], previous: Step | None) -> ComputedStep:
        """Computes every chunk in one ragged batch.

        Chunks that do not fit their blocks or the context are a ValueError, before anything runs.
        """
        if not chunks:
            return ComputedStep(results=[], forward_s=0.0, sample_s=0.0)
        started_at = time.perf_counter()
        if previous is not None:
            assert isinstance(previous, ComputedStep), "a step of another runner"
            chunks = [_resolved(chunk, previous.results) for chunk in chunks]
        hidden, spans = self._forward(chunks)
        forward_at = time.perf_counter()
        rows = [span.stop - 1 for span, chunk in zip(spans, chunks, strict=True) if chunk.sample]
        requests = [chunk.sample for chunk in chunks if chunk.sample]
        sampled = iter(
            self._sampler.sample(self._decoder.logits(hidden[rows]).float(), requests)
            if rows
            else ()
        )
        results: list[ChunkResult] = []
        for chunk, span in zip(chunks, spans, strict=True):
            token_ids, logprobs = next(sampled) if chunk.sample else ((), ())
            results.append(
                ChunkResult(
                    token_ids=token_ids,
                    logprobs=logprobs,
                    prompt_logprobs=self._prompt_logprobs(chunk, hidden[span]),
                )
            )
        return ComputedStep(
            results=results,
            forward_s=forward_at - started_at,
            sample_s=time.perf_counter() - forward_at,
        )

    def results(self, step: Step) -> list[ChunkResult]:
        """One result per chunk of a step of this runner, in order."""
        assert isinstance(step, ComputedStep), "a step of another runner"
        return step.results

    @torch.inference_mode()
    def hidden_states(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        """As `step` without sampling: per chunk [num_tokens, hidden_size] after the last norm."""
        hidden, spans = self._forward(chunks)
        return [hidden[span] for span in spans]

    def _forward(self, chunks: list[Chunk]) -> tuple[torch.Tensor, list[slice]]:
        """(hidden states [num_rows, hidden_size], the rows of each chunk)."""
        block_tokens = self.layout.block_tokens
        for chunk in chunks:
            stop = chunk.start + len(chunk.token_ids)
            limit = min(self.context_len, len(chunk.blocks) * block_tokens)
            if not chunk.token_ids or stop > limit:
                raise ValueError(f"chunk: positions {chunk.start} to {stop}; limit {limit}")
            # A block begun and not filled here: nothing of a former owner may stay in its tail.
            last = stop // block_tokens
            if chunk.start <= last * block_tokens < stop:
                self.cache.zero_blocks([chunk.blocks[last]])
        # Single tokens last and by length, so that neighbours have equally many splits.
        order = sorted(
            range(len(chunks)),
            key=lambda i: (len(chunks[i].token_ids) == 1, chunks[i].start // block_tokens),
        )
        spans = [slice(0, 0)] * len(chunks)
        row = 0
        for i in order:
            spans[i] = slice(row, row + len(chunks[i].token_ids))
            row = spans[i].stop
        batch = self._batch([chunks[i] for i in order], num_rows=row)
        return self._decoder.forward(batch, self.cache.pages), spans

    def _prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> tuple[PositionLogprobs, ...]:
        if chunk.prompt_logprobs is None:
            return ()
        results: list[PositionLogprobs] = []
        for start in range(0, len(chunk.next_token_ids), _LOGPROB_ROWS):
            token_ids = chunk.next_token_ids[start : start + _LOGPROB_ROWS]
            logits = self._decoder.logits(hidden[start : start + len(token_ids)]).float()
            results += self._sampler.prompt_logprobs(logits, token_ids, chunk.prompt_logprobs)
        return tuple(results)

    def _batch(self, chunks: list[Chunk], *, num_rows: int) -> Batch:
        """Flattens chunks in their order and pads to whole row tiles."""
        block_tokens = self.layout.block_tokens
        token_ids: list[int] = []
        positions: list[int] = []
        block_ids: list[int] = []
        for chunk in chunks:
            span = range(chunk.start, chunk.start + len(chunk.token_ids))
            token_ids.extend(chunk.token_ids)
            positions.extend(span)
            block_ids.extend(chunk.blocks[position // block_tokens] for position in span)
        padding = [0] * (-num_rows % ops.ROW_TILE)
        rows = [values + padding for values in (token_ids, positions, block_ids)]
        place = torch.tensor(rows, device=self._device)
        return Batch(
            token_ids=place[0],
            positions=place[1],
            block_ids=place[2, :num_rows],
            offsets=place[1, :num_rows] % block_tokens,
            attention=self._attention(chunks),
        )

    def _attention(self, chunks: list[Chunk]) -> GroupAttention:
        """Quantised pages come to fp32 layer by layer, so only blocks in use are counted."""
        if self.cache.pages.scales is None:
            return GroupAttention(groups=self._groups(chunks, self.cache.blocks))
        used = sorted({block for chunk in chunks for block in chunk.blocks})
        number_of = {block: number for number, block in enumerate(used)}
        chunks = [replace(c, blocks=[number_of[block] for block in c.blocks]) for c in chunks]
        heads, _, *page = self.layout.shape
        shape = (len(used), heads, 1, *page)
        groups = self._groups(chunks, torch.empty(1).expand(shape))
        return GroupAttention(groups=groups, used=torch.tensor(used))

    def _groups(self, chunks: list[Chunk], cache: torch.Tensor) -> list[ops.Group]:
        """Single tokens form groups of similar length; a longer chunk is a group of its own."""
        block_tokens = self.layout.block_tokens
        groups: list[ops.Group] = []
        first = row = 0
        while first < len(chunks):
            last = first + 1
            num_splits = chunks[first].start // block_tokens + 1
            while last < len(chunks) and len(chunks[first].token_ids) == 1:
                widest = chunks[last].start // block_tokens + 1
                size = ops.scratch_size(last - first + 1, widest, cache)
                if widest > 2 * num_splits + 2 or size > _GROUP_SIZE:
                    break
                last += 1
            stop = row + sum(len(chunk.token_ids) for chunk in chunks[first:last])
            groups.append(self._group(chunks[first:last], slice(row, stop), cache))
            first, row = last, stop
        return groups

    def _group(self, chunks: list[Chunk], rows: slice, cache: torch.Tensor) -> ops.Group:
        tables = [
            chunk.blocks[: -(-(chunk.start + len(chunk.token_ids)) // self.layout.block_tokens)]
            for chunk in chunks
        ]
        return ops.make_group(
            rows,
            [chunk.start for chunk in chunks],
            tables,
            cache,
            num_query_heads=self._num_query_heads,
            wide_rows=self._wide_rows,
            scratch=self._scratch,
        )


def _resolved(chunk: Chunk, previous: list[ChunkResult]) -> Chunk:
    """The chunk with the token that the previous step sampled in place of the unknown one."""
    if chunk.follows is None:
        return chunk
    (token_id,) = previous[chunk.follows].token_ids
    sample = chunk.sample
    if sample is not None and sample.num_pending:
        known = sample.position - len(sample.prompt_token_ids) - sample.num_pending
        outputs = [*sample.output_token_ids[:known], token_id]
        sample = replace(sample, output_token_ids=outputs, num_pending=0)
    return replace(chunk, token_ids=[token_id], sample=sample, follows=None)
