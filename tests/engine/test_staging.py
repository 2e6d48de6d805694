"""Inputs of a step: stable rows, few changes, passes, what the device ends up with."""

from __future__ import annotations

import random

import torch

from engine.plan import UNKNOWN_TOKEN, Chunk
from engine.ragged import ROW_MULTIPLE, Span, pass_inputs, passes_of
from engine.staging import RowInputs
from kernels import ops

CPU = torch.device("cpu")
BLOCK_TOKENS = 4


def rows(max_rows: int = 8) -> RowInputs:
    return RowInputs(max_rows=max_rows, max_blocks=16, block_tokens=BLOCK_TOKENS, device=CPU)


def single(length: int, blocks: list[int], token: int = 7, follows: int | None = None) -> Chunk:
    """The last token of a sequence of that length."""
    token = token if follows is None else UNKNOWN_TOKEN
    return Chunk(token_ids=[token], start=length - 1, blocks=blocks, follows=follows)


def check(inputs: RowInputs, chunks: list[Chunk], placed: list[int], num_rows: int) -> None:
    """The device holds what the chunks say, in their rows, and padding elsewhere."""
    assert sorted(placed) == list(range(len(chunks)))
    ops.update_table(inputs.table(inputs.max_rows), inputs.changes)
    for chunk, row in zip(chunks, placed, strict=True):
        count = chunk.start // BLOCK_TOKENS + 1
        assert inputs.table(num_rows)[row, :count].tolist() == chunk.blocks[:count]
        assert int(inputs.section("lengths", num_rows)[row]) == chunk.start + 1
        assert int(inputs.section("positions", num_rows)[row]) == chunk.start
        assert int(inputs.section("block_ids", num_rows)[row]) == chunk.blocks[count - 1]
        assert int(inputs.section("offsets", num_rows)[row]) == chunk.start % BLOCK_TOKENS
    padding = inputs.section("block_ids", num_rows)[len(chunks) :]
    assert (padding == -1).all()
    assert not inputs.section("lengths", num_rows)[len(chunks) :].any()


def test_random_lives_reach_the_device() -> None:
    """Sequences come, grow, go and are reordered; blocks are reused by others."""
    rng = random.Random(4)
    inputs, free = rows(), list(range(100))
    live: list[tuple[int, list[int]]] = []
    for _ in range(200):
        if live and rng.random() < 0.2:
            _, blocks = live.pop(rng.randrange(len(live)))
            free += blocks
        while len(live) < 8 and (not live or rng.random() < 0.3):
            length = rng.randrange(1, 40)
            count = -(-length // BLOCK_TOKENS)
            rng.shuffle(free)
            live.append((length, [free.pop() for _ in range(count)]))
        rng.shuffle(live)
        chunks = [single(length, blocks) for length, blocks in live]
        check(inputs, chunks, inputs.send(chunks, (), 8), 8)
        grown: list[tuple[int, list[int]]] = []
        for length, blocks in live:
            if length + 1 > len(blocks) * BLOCK_TOKENS:
                blocks = [*blocks, free.pop()]
            if length < 60:
                grown.append((length + 1, blocks))
            else:
                free += blocks
        live = grown


def test_a_sequence_keeps_its_row_and_changes_little() -> None:
    inputs = rows()
    tables = [[10 * i, 10 * i + 1] for i in range(5)]
    before = inputs.send([single(6, table) for table in tables], (), 8)
    assert int(inputs.changes[0]) == 10
    after = inputs.send([single(7, table) for table in reversed(tables)], (), 8)
    assert after == before[::-1] and int(inputs.changes[0]) == 0
    longer = [single(9, [*table, 100 + i]) for i, table in enumerate(tables)]
    assert inputs.send(longer, (), 8) == before and int(inputs.changes[0]) == 5
    # The second ends: only the last one moves, into its row.
    rest = [longer[i] for i in (0, 2, 3, 4)]
    moved = inputs.send(rest, (), 8)
    assert moved == [before[0], before[2], before[3], before[1]] and int(inputs.changes[0]) == 3


def test_tokens_of_the_step_before_are_named_by_their_place() -> None:
    inputs = rows()
    chunks = [single(3, [0], token=5), single(3, [1], follows=1), single(3, [2], follows=0)]
    placed = inputs.send(chunks, [40, 50], 4)
    sources, tokens = inputs.section("sources", 4), inputs.section("token_ids", 4)
    assert sources[placed].tolist() == [-1, 50, 40] and int(sources[3]) == -1
    assert tokens[placed].tolist() == [5, 0, 0]


def test_more_changes_than_fit_bring_the_whole_table() -> None:
    inputs = RowInputs(max_rows=2, max_blocks=64, block_tokens=BLOCK_TOKENS, device=CPU)
    chunks = [single(200, list(range(i, 100 + i, 2))) for i in (0, 1)]
    placed = inputs.send(chunks, (), 2)
    assert int(inputs.changes[0]) == 0
    check(inputs, chunks, placed, 2)


def chunk(num_tokens: int, start: int, prompt_len: int, first_block: int = 0) -> Chunk:
    tokens = list(range(1, num_tokens + 1))
    blocks = list(range(first_block, first_block + 40))
    return Chunk(token_ids=tokens, start=start, blocks=blocks, prompt_len=prompt_len)


def test_a_chunk_is_cut_where_its_outputs_begin() -> None:
    step = [chunk(5, 8, 10), chunk(3, 0, 3), chunk(1, 20, 4)]
    (one,) = passes_of(step, max_decode=16, max_splits=64, split_tokens=8)
    assert one.prefill == [Span(chunk=0, start=8, stop=10), Span(chunk=1, start=0, stop=3)]
    assert one.decode == [Span(chunk=0, start=10, stop=13), Span(chunk=2, start=20, stop=21)]
    assert (one.first_prefill_row, one.num_rows) == (ROW_MULTIPLE, 2 * ROW_MULTIPLE)
    inputs = pass_inputs(step, one, (), block_tokens=BLOCK_TOKENS, device=CPU)
    assert inputs.token_ids[:4].tolist() == [3, 4, 5, 1]
    assert inputs.token_ids[16:21].tolist() == [1, 2, 1, 2, 3]
    assert inputs.lengths[:5].tolist() == [11, 12, 13, 21, 0]
    assert inputs.decode_table.shape == (16, 16) and inputs.prefill_table.shape == (2, 16)
    assert inputs.block_ids[16:22].tolist() == [2, 2, 0, 0, 0, -1]


def test_passes_hold_no_more_rows_and_splits_than_there_is_room_for() -> None:
    step = [chunk(30, 0, 1), chunk(20, 60, 1), chunk(7, 0, 7)]
    parts = passes_of(step, max_decode=16, max_splits=40, split_tokens=8)
    spans = [span for part in parts for span in part.decode]
    covered = [(span.chunk, p) for span in spans for p in range(span.start, span.stop)]
    assert covered == [(0, p) for p in range(1, 30)] + [(1, p) for p in range(60, 80)]
    for part in parts:
        splits = sum(p // 8 + 1 for span in part.decode for p in range(span.start, span.stop))
        padding = part.first_prefill_row - part.num_decode
        assert part.num_decode <= 16
        assert splits == part.num_splits and (splits + padding <= 40 or part.num_decode == 1)
    assert [span.chunk for part in parts for span in part.prefill] == [0, 2]
