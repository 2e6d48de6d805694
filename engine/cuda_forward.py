"""From rows or chunks to hidden states on a GPU: batches, attention plans, passes.

Owns the scratch memory of decode attention. Never samples, never keeps a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.attention import PagedAttention
from engine.batch import Batch
from engine.config import ModelConfig
from engine.decoder import Decoder
from engine.kv_cache import KvCache
from engine.plan import Chunk
from engine.prompt_graphs import PromptInputs
from engine.ragged import ROW_MULTIPLE, Pass, PassInputs, Span, padded, pass_inputs, passes_of
from engine.staging import RowInputs
from engine.written import WrittenMark
from kernels import ops


class CudaForward:
    """Runs the decoder over at most max_decode output positions a pass, and any prompt positions.

    context_len: what model and cache can hold; sampled: where the tokens of the step before are,
    on the device. `written` reports passes that are no step of output positions alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: Decoder,
        cache: KvCache,
        *,
        max_decode: int,
        sampled: torch.Tensor,
        pdl: bool,
        tables: ops.TileTables | None = None,
    ) -> None:
        self._config, self._decoder, self._cache = config, decoder, cache
        self._sampled, self._pdl = sampled, pdl
        self._tables = tables or ops.TileTables.empty()
        self._device = cache.storage.device
        self.written = WrittenMark(self._device)
        self._block_tokens = cache.layout.block_tokens
        capacity = cache.num_blocks * self._block_tokens
        self.context_len = min(config.context_len, capacity)
        self._max_decode = max_decode
        self._max_blocks = padded(-(-self.context_len // self._block_tokens))
        self._max_splits = (
            ops.max_decode_splits(
                max_decode, cache.num_blocks, self._max_blocks, self._block_tokens
            )
            + ROW_MULTIPLE
        )
        self._workspace = ops.DecodeWorkspace.allocate(
            max_rows=max_decode,
            max_splits=self._max_splits,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_tokens=self._block_tokens,
            device=self._device,
        )

    def row_inputs(self) -> RowInputs:
        """Static inputs for `rows`."""
        return RowInputs(
            max_rows=self._max_decode,
            max_blocks=self._max_blocks,
            block_tokens=self._block_tokens,
            device=self._device,
        )

    def prompt_inputs(self, max_rows: int) -> PromptInputs:
        """Static inputs for `prompt_rows`."""
        return PromptInputs(
            max_rows=max_rows,
            max_blocks=self._max_blocks,
            block_tokens=self._block_tokens,
            group_size=self._config.num_heads // self._config.num_kv_heads,
            device=self._device,
        )

    def check(self, chunks: list[Chunk]) -> None:
        """ValueError for chunks that do not fit their blocks or the context."""
        for chunk in chunks:
            stop = chunk.start + len(chunk.token_ids)
            limit = min(self.context_len, len(chunk.blocks) * self._block_tokens)
            if not chunk.token_ids or stop > limit:
                raise ValueError(f"chunk: positions {chunk.start} to {stop}; limit {limit}")

    def rows(self, inputs: RowInputs, num_rows: int) -> torch.Tensor:
        """Enqueues a step over the first num_rows rows; hidden states [num_rows, hidden_size]."""
        pdl, section = self._pdl, inputs.section
        ops.update_table(inputs.table(inputs.max_rows), inputs.changes, pdl=pdl)
        table, lengths = inputs.table(num_rows), section("lengths", num_rows)
        batch = Batch(
            token_ids=section("token_ids", num_rows),
            positions=section("positions", num_rows),
            block_ids=section("block_ids", num_rows),
            offsets=section("offsets", num_rows),
            attention=self._attention(num_rows, table, lengths, None),
            sources=section("sources", num_rows),
            sampled=self._sampled,
            pdl=pdl,
        )
        return self._decoder.forward(batch, self._cache.pages)

    def prompt_rows(self, inputs: PromptInputs, num_rows: int) -> torch.Tensor:
        """Enqueues a pass over prompts in num_rows rows; hidden states [num_rows, hidden_size]."""
        section = inputs.section
        batch = Batch(
            token_ids=section("token_ids", num_rows),
            positions=section("positions", num_rows),
            block_ids=section("block_ids", num_rows),
            offsets=section("offsets", num_rows),
            attention=PagedAttention(num_decode=0, prefill=inputs.plan(num_rows)),
            sources=section("sources", num_rows),
            sampled=self._sampled,
            pdl=self._pdl,
            on_written=self.written.enqueue,
        )
        return self._decoder.forward(batch, self._cache.pages)

    def passes(self, chunks: list[Chunk]) -> list[Pass]:
        """The passes in which a step of any chunks is computed."""
        return passes_of(
            chunks,
            max_decode=self._max_decode,
            max_splits=self._max_splits,
            split_tokens=ops.SPLIT_TOKENS,
        )

    def one_pass(
        self, chunks: list[Chunk], part: Pass, places: Sequence[int], *, is_dry: bool = False
    ) -> torch.Tensor:
        """Enqueues a pass, kernel by kernel; hidden states [num_rows, hidden_size].

        places: where the step before put the token of each of its chunks; is_dry: no KV is written.
        """
        inputs = pass_inputs(
            chunks, part, places, block_tokens=self._block_tokens, device=self._device
        )
        if is_dry:
            inputs.block_ids.fill_(-1)
        num_decode = part.first_prefill_row
        batch = Batch(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            block_ids=inputs.block_ids,
            offsets=inputs.offsets,
            attention=self._attention(
                num_decode,
                inputs.decode_table,
                inputs.lengths[:num_decode],
                self._prefill_plan(part, inputs),
            ),
            sources=inputs.sources,
            sampled=self._sampled,
            pdl=self._pdl,
            on_written=self.written.enqueue,
        )
        return self._decoder.forward(batch, self._cache.pages)

    def warm_up(self, chunk_tokens: int) -> None:
        """Compiles what prompts need, by chunks of every power of two up to chunk_tokens.

        Nothing reaches the cache: all rows are padding, and what they read are zeros.
        """
        sizes = [1 << n for n in range(4, chunk_tokens.bit_length()) if 1 << n < chunk_tokens]
        for size in (*sizes, chunk_tokens):
            size = min(size, self.context_len)
            blocks = [0] * -(-size // self._block_tokens)
            chunk = Chunk(token_ids=[0] * size, start=0, blocks=blocks, prompt_len=size)
            part = Pass(prefill=[Span(chunk=0, start=0, stop=size)])
            self.one_pass([chunk], part, (), is_dry=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _prefill_plan(self, part: Pass, inputs: PassInputs) -> ops.PrefillPlan | None:
        if not part.prefill:
            return None
        return ops.prefill_plan(
            inputs.prefill_table,
            [span.stop - span.start for span in part.prefill],
            [span.start for span in part.prefill],
            group_size=self._config.num_heads // self._config.num_kv_heads,
            block_tokens=self._block_tokens,
        )

    def _attention(
        self,
        num_decode: int,
        table: torch.Tensor,
        lengths: torch.Tensor,
        prefill: ops.PrefillPlan | None,
    ) -> PagedAttention:
        """table [num_decode, width] int32, lengths [num_decode] int32 of the decode rows."""
        config = self._config
        key = ops.attention_key(config.num_heads, config.num_kv_heads, config.head_dim)
        values = self._tables.at("paged_decode", key, max(1, num_decode))
        decode = None
        if num_decode:
            decode = ops.decode_plan(table, lengths, self._workspace, pdl=self._pdl)
        return PagedAttention(
            num_decode=num_decode,
            decode=decode,
            decode_config=ops.DecodeConfig(**values) if values else None,
            prefill=prefill,
            pdl=self._pdl,
        )
