"""Host side of a decode step's inputs: pinned memory that one small copy brings to the device.

Owns which row of the batch a sequence has (the same from step to step, so that block tables, which
stay on the device, change by a few entries only) and the pinned buffers. Never launches a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.plan import Chunk

SECTIONS = ("token_ids", "sources", "positions", "lengths", "block_ids", "offsets")
"""int32 values per row: token from the host; place of the token in the step before, or -1; its
position; KV tokens it sees (0: padding); block and offset that its KV goes to (-1: nowhere)."""
PADDING = (0, -1, 0, 0, -1, 0)
"""SECTIONS of a row that nobody asked for."""
_CHANGES_PER_ROW = 8


class RowInputs:
    """The same device memory for ever: SECTIONS, changes to the table, the table.

    changes: as ops.update_table takes them, for table [max_rows, max_blocks].
    """

    def __init__(
        self, *, max_rows: int, max_blocks: int, block_tokens: int, device: torch.device
    ) -> None:
        self.max_rows = max_rows
        self._block_tokens = block_tokens
        self._head = len(SECTIONS) * max_rows
        self._max_changes = _CHANGES_PER_ROW * max_rows
        size = self._head + 1 + 2 * self._max_changes
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        sections = self._device[: self._head].view(len(SECTIONS), max_rows)
        self._sections: dict[str, torch.Tensor] = dict(zip(SECTIONS, sections, strict=True))
        self.changes = self._device[self._head :]
        self._table = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)
        self._mirrors = [Pinned((size,), device) for _ in range(2)]
        self._whole = Pinned((max_rows, max_blocks), device)
        self._tables: list[list[int]] = [[] for _ in range(max_rows)]
        self._row_of: dict[int, int] = {}

    def section(self, name: str, num_rows: int) -> torch.Tensor:
        """[num_rows] int32 on the device."""
        return self._sections[name][:num_rows]

    def table(self, num_rows: int) -> torch.Tensor:
        """[num_rows, max_blocks] int32 on the device."""
        return self._table[:num_rows]

    def send(self, chunks: list[Chunk], places: Sequence[int], num_rows: int) -> list[int]:
        """Enqueues the inputs of single-token chunks, padded to num_rows; the row of each chunk.

        places: where the step before put the token of each of its chunks. The step's kernels must
        begin with ops.update_table.
        """
        mirror = self._mirrors[0]
        self._mirrors.reverse()
        mirror.wait()
        rows = self._assign(chunks)
        self._fill(mirror.values, chunks, rows, places, num_rows)
        changes = self._changes(chunks, rows)
        if len(changes) > 2 * self._max_changes:
            self._whole.send(self._table, num_rows)
            changes = []
        mirror.values[self._head] = len(changes) // 2
        first = self._head + 1
        mirror.values[first : first + len(changes)] = changes
        mirror.send(self._device, first + len(changes))
        return rows

    def _assign(self, chunks: list[Chunk]) -> list[int]:
        """Rows 0 to len(chunks) - 1; a sequence is known by the block it writes, its own."""
        before, num_chunks, step = self._row_of, len(chunks), self._block_tokens
        rows = [-1] * num_chunks
        taken = bytearray(num_chunks)
        late: list[int] = []
        for number, chunk in enumerate(chunks):
            last = chunk.start // step
            row = before.get(chunk.blocks[last], -1)
            if row < 0 < last:
                row = before.get(chunk.blocks[last - 1], -1)
            if 0 <= row < num_chunks and not taken[row]:
                taken[row] = 1
                rows[number] = row
            else:
                late.append(number)
        if late:
            free = (row for row in range(num_chunks) if not taken[row])
            for number in late:
                rows[number] = next(free)
        self._row_of = {c.blocks[c.start // step]: r for c, r in zip(chunks, rows, strict=True)}
        return rows

    def _fill(
        self,
        values: np.ndarray,
        chunks: list[Chunk],
        rows: list[int],
        places: Sequence[int],
        num_rows: int,
    ) -> None:
        num_chunks, step = len(chunks), self._block_tokens
        order = np.array(rows)
        starts = np.fromiter((chunk.start for chunk in chunks), np.int32, num_chunks)
        head = values[: self._head].reshape(len(SECTIONS), self.max_rows)
        head[0, order] = [c.token_ids[0] if c.follows is None else 0 for c in chunks]
        head[1, order] = [-1 if c.follows is None else places[c.follows] for c in chunks]
        head[2, order] = starts
        head[3, order] = starts + 1
        head[4, order] = [c.blocks[c.start // step] for c in chunks]
        head[5, order] = starts % step
        if num_rows > num_chunks:
            head[:, num_chunks:num_rows] = np.array(PADDING, np.int32)[:, None]

    def _changes(self, chunks: list[Chunk], rows: list[int]) -> list[int]:
        """Places and values of entries that are not on the device yet, alternating."""
        tables, step, width = self._tables, self._block_tokens, self._table.shape[1]
        changes: list[int] = []
        for chunk, row in zip(chunks, rows, strict=True):
            blocks, known = chunk.blocks[: chunk.start // step + 1], tables[row]
            if blocks == known:
                continue
            first = len(known) if blocks[: len(known)] == known else 0
            tables[row] = blocks
            self._whole.wait()
            self._whole.values[row, first : len(blocks)] = blocks[first:]
            for column in range(first, len(blocks)):
                changes += (row * width + column, blocks[column])
        return changes


class Pinned:
    """int32 values in pinned memory; `wait` before they change."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._tensor = torch.zeros(shape, dtype=torch.int32, pin_memory=is_cuda)
        self.values = self._tensor.numpy()
        self._sent = torch.cuda.Event() if is_cuda else None

    def wait(self) -> None:
        """Until the device has read what was sent last."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, target: torch.Tensor, size: int) -> None:
        """Enqueues a copy of the first `size` values, or rows."""
        target[:size].copy_(self._tensor[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
