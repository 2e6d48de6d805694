"""CUDA graphs of passes over prompts: a short prompt costs its kernels, not four hundred launches.

Owns the static inputs and outputs of such passes and which passes fit one; the kernels and their
bits are those of any other pass. Never samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from engine.cuda_graphs import GraphBuckets, GraphPool
from engine.plan import Chunk
from engine.ragged import Pass, fill_rows
from engine.staging import SECTIONS, Pinned
from kernels import ops

MAX_PROMPTS = 16
"""Prompts of a pass that a graph takes."""
MAX_ROWS = 3072
"""Above it the device takes longer than the launches do (Qwen3-8B in FP8 on an H100)."""

_Array = TypeVar("_Array", torch.Tensor, np.ndarray)


def prompt_sizes(chunk_tokens: int) -> list[int]:
    """Rows of the graphs: to the first that holds chunk_tokens, at most MAX_ROWS; of a size's rows
    more than two in three are used from 128 on.
    """
    steps = ((64, 256, 64), (256, 1024, 128), (1024, 2048, 256), (2048, MAX_ROWS + 1, 512))
    sizes = [size for first, stop, step in steps for size in range(first, stop, step)]
    num_smaller = sum(size < chunk_tokens for size in sizes)
    return sizes[: num_smaller + 1]


class PromptInputs:
    """The same device memory for ever, for passes of up to max_rows rows, all of prompts."""

    def __init__(
        self,
        *,
        max_rows: int,
        max_blocks: int,
        block_tokens: int,
        group_size: int,
        device: torch.device,
    ) -> None:
        """max_blocks: width of a block table; group_size: query heads per KV head."""
        self._max_rows, self._block_tokens, self._group_size = max_rows, block_tokens, group_size
        self._rows_size = len(SECTIONS) * max_rows
        self._tiles_size = 4 * self._num_tiles(max_rows)
        size = self._rows_size + self._tiles_size + MAX_PROMPTS * max_blocks
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._mirrors = [Pinned((size,), device) for _ in range(2)]
        self._send_empty()

    def section(self, name: str, num_rows: int) -> torch.Tensor:
        """[num_rows] int32 on the device."""
        rows, _, _ = self._parts(self._device)
        return rows[SECTIONS.index(name), :num_rows]

    def plan(self, num_rows: int) -> ops.PrefillPlan:
        """What attention looks at in a pass of num_rows rows."""
        _, tiles, table = self._parts(self._device)
        return ops.PrefillPlan(tiles=tiles[: self._num_tiles(num_rows)], block_table=table)

    def send(self, chunks: list[Chunk], part: Pass, places: Sequence[int]) -> None:
        """Enqueues the inputs of a pass over prompts; places as in engine.ragged.pass_inputs."""
        mirror = self._mirrors[0]
        self._mirrors.reverse()
        mirror.wait()
        rows, tiles, table = self._parts(mirror.values)
        fill_rows(rows, chunks, part, places, self._block_tokens)
        made = ops.prefill_tiles(
            [span.stop - span.start for span in part.prefill],
            [span.start for span in part.prefill],
            group_size=self._group_size,
        )
        tiles[: len(made)] = made
        tiles[len(made) :] = ops.EMPTY_TILE
        for number, span in enumerate(part.prefill):
            blocks = chunks[span.chunk].blocks[: -(-span.stop // self._block_tokens)]
            table[number, : len(blocks)] = blocks
        mirror.send(self._device, len(mirror.values))

    def _send_empty(self) -> None:
        """No tile has rows, no row has a block: captures write nothing."""
        rows, tiles, _ = self._parts(self._device)
        rows[SECTIONS.index("sources")] = rows[SECTIONS.index("block_ids")] = -1
        tiles[:] = torch.tensor(ops.EMPTY_TILE, dtype=torch.int32)

    def _num_tiles(self, num_rows: int) -> int:
        """At most, of a pass of num_rows rows."""
        return -(-num_rows // ops.prefill_tile_tokens(self._group_size)) + MAX_PROMPTS

    def _parts(self, whole: _Array) -> tuple[_Array, _Array, _Array]:
        """Rows [len(SECTIONS), max_rows], tiles [n, 4], table [MAX_PROMPTS, max_blocks]."""
        last = self._rows_size + self._tiles_size
        return (
            whole[: self._rows_size].reshape(len(SECTIONS), self._max_rows),
            whole[self._rows_size : last].reshape(-1, 4),
            whole[last:].reshape(MAX_PROMPTS, -1),
        )


class PromptGraphs:
    """Captured passes by number of rows; forward(num_rows) enqueues one over `inputs`."""

    def __init__(
        self,
        sizes: list[int],
        inputs: PromptInputs,
        forward: Callable[[int], torch.Tensor],
        hidden: torch.Tensor,
        pool: GraphPool,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """hidden [largest size, hidden_size]: where the hidden states of a pass are left."""
        self._inputs, self._forward, self._hidden = inputs, forward, hidden
        self._graphs = GraphBuckets("prompt passes", sizes, self._enqueue, pool, progress)

    def fits(self, part: Pass) -> bool:
        """Whether `run` takes it."""
        return (
            not part.decode
            and len(part.prefill) <= MAX_PROMPTS
            and part.num_rows <= self._graphs.largest
        )

    def run(self, chunks: list[Chunk], part: Pass, places: Sequence[int]) -> torch.Tensor:
        """Enqueues a pass; hidden states [num_rows, hidden_size], until the next one."""
        self._inputs.send(chunks, part, places)
        self._graphs.replay(self._graphs.size_for(part.num_rows))
        return self._hidden[: part.num_rows]

    def _enqueue(self, num_rows: int) -> None:
        self._hidden[:num_rows].copy_(self._forward(num_rows))
