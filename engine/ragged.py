"""A step of any chunks on a GPU: which rows it has, in which passes, and their inputs.

Owns the split of a chunk into rows at prompt positions (prefill attention) and at output positions
(decode attention), and the form in which one copy brings a pass to the device. Rows are padded to
fixed multiples, so that kernels are compiled for few kinds of sizes. Never launches a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.plan import Chunk
from engine.staging import PADDING, SECTIONS

ROW_MULTIPLE = 16
"""Rows of a pass, its decode rows and the width of its block tables are multiples of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Positions start to stop - 1 of chunk number `chunk`."""

    chunk: int
    start: int
    stop: int


@dataclass(slots=True, kw_only=True)
class Pass:
    """Rows computed together: decode rows, padding, prefill rows, padding."""

    decode: list[Span] = field(default_factory=list)
    prefill: list[Span] = field(default_factory=list)
    num_decode: int = 0
    num_splits: int = 0

    @property
    def first_prefill_row(self) -> int:
        """Decode rows, padding included."""
        return padded(self.num_decode)

    @property
    def num_rows(self) -> int:
        """All rows, padding included."""
        prefill = sum(span.stop - span.start for span in self.prefill)
        return padded(self.first_prefill_row + prefill)

    def places(self) -> list[tuple[Span, int]]:
        """Each span and its first row; a chunk's spans in the order of their positions."""
        prefill = _placed(self.prefill, self.first_prefill_row)
        return [*prefill, *_placed(self.decode, 0)]


def _placed(spans: list[Span], row: int) -> list[tuple[Span, int]]:
    """Each span and its first row, one after the other from `row` on."""
    places: list[tuple[Span, int]] = []
    for span in spans:
        places.append((span, row))
        row += span.stop - span.start
    return places


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInputs:
    """int32 tensors of a pass on the device, as engine.staging.SECTIONS, [num_rows] each.

    decode_table [first_prefill_row, width]; prefill_table [num prefill spans, width].
    """

    token_ids: torch.Tensor
    sources: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    block_ids: torch.Tensor
    offsets: torch.Tensor
    decode_table: torch.Tensor
    prefill_table: torch.Tensor


def padded(num_rows: int) -> int:
    """The next multiple of ROW_MULTIPLE."""
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE


def passes_of(
    chunks: list[Chunk], *, max_decode: int, max_splits: int, split_tokens: int
) -> list[Pass]:
    """Passes in which the chunks are computed, one after the other; usually one.

    A pass has at most max_decode decode rows, whose contexts have at most max_splits splits of
    split_tokens tokens (a single row may have more). Rows of padding have a split each.
    """
    max_splits -= ROW_MULTIPLE - 1
    passes = [Pass()]
    for number, chunk in enumerate(chunks):
        start, stop = chunk.start, chunk.start + len(chunk.token_ids)
        middle = min(max(start, chunk.prompt_len), stop)
        if start < middle:
            passes[-1].prefill.append(Span(chunk=number, start=start, stop=middle))
        position = middle
        while position < stop:
            now = passes[-1]
            last = position
            while last < stop and now.num_decode < max_decode:
                num_splits = last // split_tokens + 1
                if now.num_decode and now.num_splits + num_splits > max_splits:
                    break
                now.num_decode += 1
                now.num_splits += num_splits
                last += 1
            if last > position:
                now.decode.append(Span(chunk=number, start=position, stop=last))
            position = last
            if position < stop:
                passes.append(Pass())
    return passes


def pass_inputs(
    chunks: list[Chunk],
    part: Pass,
    places: Sequence[int],
    *,
    block_tokens: int,
    device: torch.device,
) -> PassInputs:
    """Enqueues one copy of a pass's inputs; places: as for engine.staging.RowInputs.send."""
    num_rows, num_decode = part.num_rows, part.first_prefill_row
    widest = max((-(-span.stop // block_tokens) for span, _ in part.places()), default=1)
    width = padded(widest)
    head = len(SECTIONS) * num_rows
    size = head + (num_decode + len(part.prefill)) * width
    is_cuda = device.type == "cuda"
    pinned = torch.zeros(size, dtype=torch.int32, pin_memory=is_cuda)
    values = pinned.numpy()
    fill_rows(values[:head].reshape(len(SECTIONS), num_rows), chunks, part, places, block_tokens)
    tables = values[head:].reshape(-1, width)
    for number, (span, row) in enumerate(part.places()):
        chunk, is_decode = chunks[span.chunk], number >= len(part.prefill)
        blocks = chunk.blocks[: -(-span.stop // block_tokens)]
        first = row if is_decode else num_decode + number
        num_tables = span.stop - span.start if is_decode else 1
        tables[first : first + num_tables, : len(blocks)] = blocks
    sent = pinned.to(device, non_blocking=True) if is_cuda else pinned
    sections = sent[:head].view(len(SECTIONS), num_rows).unbind(0)
    decode_table, prefill_table = sent[head:].view(-1, width).split([num_decode, len(part.prefill)])
    return PassInputs(
        **dict(zip(SECTIONS, sections, strict=True)),
        decode_table=decode_table,
        prefill_table=prefill_table,
    )


def fill_rows(
    rows: np.ndarray, chunks: list[Chunk], part: Pass, places: Sequence[int], block_tokens: int
) -> None:
    """Fills rows [len(SECTIONS), num_rows] int32, padding included; places as in `pass_inputs`."""
    rows[:] = np.array(PADDING, np.int32)[:, None]
    for span, row in part.places():
        stop = row + span.stop - span.start
        _fill(rows[:, row:stop], chunks[span.chunk], span, places, block_tokens)


def _fill(
    rows: np.ndarray, chunk: Chunk, span: Span, places: Sequence[int], block_tokens: int
) -> None:
    """Fills rows [len(SECTIONS), num_tokens] int32 with the span of its chunk.

    places: where the step before put the token of each of its chunks.
    """
    if chunk.follows is None:
        rows[0] = chunk.token_ids[span.start - chunk.start : span.stop - chunk.start]
    else:
        rows[1] = places[chunk.follows]
    positions = np.arange(span.start, span.stop, dtype=np.int32)
    rows[2] = positions
    rows[3] = positions + 1
    first = span.start // block_tokens
    blocks = np.array(chunk.blocks[first : -(-span.stop // block_tokens)], dtype=np.int32)
    rows[4] = blocks[positions // block_tokens - first]
    rows[5] = positions % block_tokens
