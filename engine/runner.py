"""Runs one step on tensors: chunks in, results out. Called in the engine thread only.

Owns decoder, cache and sampler of a process; never decides what runs and knows no request.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.decoder import Batch, Decoder
from engine.errors import ModelError
from engine.kv_cache import KvCache
from engine.plan import Chunk, ChunkResult
from engine.sampler import Sampler
from engine.weights import load_weights
from kernels import ops
from kv.layout import BlockLayout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ModelRunner:
    """Decoder + cache + sampler."""

    def __init__(
        self, config: ModelConfig, decoder: Decoder, cache: KvCache, sampler: Sampler
    ) -> None:
        self.config = config
        self.cache = cache
        self.layout = cache.layout
        self.context_len = min(config.context_len, cache.num_blocks * cache.layout.block_tokens)
        self._decoder = decoder
        self._sampler = sampler
        self._device = cache.storage.device

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        device: str,
        dtype: str,
        kv_bytes: int,
        block_tokens: int,
        progress: Callable[[str], None],
    ) -> ModelRunner:
        """Loads a model directory; ModelError or ValueError says what does not fit."""
        config = ModelConfig.load(model_dir)
        target, kind = torch.device(device), DTYPES[dtype]
        layout = BlockLayout(
            num_kv_heads=config.num_kv_heads,
            num_layers=config.num_layers,
            block_tokens=block_tokens,
            head_dim=config.head_dim,
            dtype_num_bytes=kind.itemsize,
        )
        num_blocks = kv_bytes // layout.num_bytes
        if num_blocks < 1:
            raise ModelError(
                f"kv_bytes = {kv_bytes} is less than one block of {layout.num_bytes} bytes"
            )
        parameters = load_weights(model_dir, config, device=target, dtype=kind, progress=progress)
        cache = KvCache(layout, num_blocks, target, kind)
        sampler = Sampler(config.vocab_size, target)
        return cls(config, Decoder(config, parameters), cache, sampler)

    @torch.inference_mode()
    def step(self, chunks: list[Chunk]) -> list[ChunkResult]:
        """Computes every chunk in one ragged batch; one result per chunk, in order."""
        hidden = self._decoder.forward(self._batch(chunks), self.cache.blocks)
        ends, end = [], 0
        for chunk in chunks:
            end += len(chunk.token_ids)
            ends.append(end)
        rows = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.sample]
        requests = [chunk.sample for chunk in chunks if chunk.sample]
        sampled = iter(
            self._sampler.sample(self._decoder.logits(hidden[rows]), requests) if rows else ()
        )
        results: list[ChunkResult] = []
        for chunk, end in zip(chunks, ends, strict=True):
            token_ids, logprobs = next(sampled) if chunk.sample else ((), ())
            results.append(
                ChunkResult(
                    token_ids=token_ids,
                    logprobs=logprobs,
                    prompt_logprobs=self._prompt_logprobs(chunk, hidden, end),
                )
            )
        return results

    def _prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor, end: int) -> tuple:
        if chunk.prompt_logprobs is None or not chunk.next_token_ids:
            return ()
        start = end - len(chunk.token_ids)
        rows = hidden[start : start + len(chunk.next_token_ids)]
        return tuple(
            self._sampler.prompt_logprobs(
                self._decoder.logits(rows), chunk.next_token_ids, chunk.prompt_logprobs
            )
        )

    def _batch(self, chunks: list[Chunk]) -> Batch:
        """Flattens chunks; single tokens of different sequences are attended in one group."""
        block_tokens = self.layout.block_tokens
        token_ids: list[int] = []
        positions: list[int] = []
        block_ids: list[int] = []
        for chunk in chunks:
            span = range(chunk.start, chunk.start + len(chunk.token_ids))
            token_ids.extend(chunk.token_ids)
            positions.extend(span)
            block_ids.extend(chunk.blocks[position // block_tokens] for position in span)
        place = torch.tensor([token_ids, positions, block_ids], device=self._device)
        return Batch(
            token_ids=place[0],
            positions=place[1],
            block_ids=place[2],
            offsets=place[1] % block_tokens,
            groups=self._groups(chunks, place[1]),
        )

    def _groups(self, chunks: list[Chunk], positions: torch.Tensor) -> list[ops.Group]:
        """Runs of single-token chunks form one group; a longer chunk is a group of its own."""
        groups: list[ops.Group] = []
        run: list[Chunk] = []
        row = 0

        def close_run() -> None:
            if run:
                groups.append(self._group(run, slice(row - len(run), row), positions))
                run.clear()

        for chunk in chunks:
            if len(chunk.token_ids) == 1:
                run.append(chunk)
                row += 1
                continue
            close_run()
            row += len(chunk.token_ids)
            groups.append(self._group([chunk], slice(row - len(chunk.token_ids), row), positions))
        close_run()
        return groups

    def _group(self, chunks: list[Chunk], rows: slice, positions: torch.Tensor) -> ops.Group:
        block_tokens = self.layout.block_tokens
        needed = [-(-(c.start + len(c.token_ids)) // block_tokens) for c in chunks]
        width = max(needed)
        table = [
            c.blocks[:n] + [c.blocks[0]] * (width - n) for c, n in zip(chunks, needed, strict=True)
        ]
        return ops.make_group(
            rows, positions[rows], torch.tensor(table, device=self._device), block_tokens
        )
