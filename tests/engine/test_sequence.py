"""A sequence's progress, its chunks, and when it ends."""

from __future__ import annotations

from typing import Any

import pytest

from engine.plan import ChunkResult, FinishReason, SamplingParams, StoppingParams
from engine.sequence import Sequence, finish_reason_for


def sequence(prompt: list[int], **changes: Any) -> Sequence:
    stopping = changes.pop("stopping", StoppingParams(max_new_tokens=4))
    seeds = changes.pop("seeds", (1,))
    return Sequence("key", prompt, seeds, SamplingParams(), stopping, **changes)


@pytest.mark.parametrize(
    ("token_id", "num_output_tokens", "reason"),
    [
        (5, 3, None),
        (5, 8, FinishReason.LENGTH),
        (1, 3, FinishReason.EOS),
        (2, 3, FinishReason.STOP_TOKEN),
        (3, 3, FinishReason.EOS),
        (1, 8, FinishReason.EOS),
        (1, 2, None),
        (2, 1, None),
    ],
)
def test_the_reason_to_end(
    token_id: int, num_output_tokens: int, reason: FinishReason | None
) -> None:
    stopping = StoppingParams(
        max_new_tokens=8,
        min_new_tokens=2,
        eos_token_ids=frozenset({1, 3}),
        stop_token_ids=frozenset({2, 3}),
    )
    assert finish_reason_for(token_id, num_output_tokens, stopping) is reason


def test_length_comes_even_below_the_minimum() -> None:
    stopping = StoppingParams(max_new_tokens=1, min_new_tokens=3)
    assert finish_reason_for(0, 1, stopping) is FinishReason.LENGTH


def test_chunks_follow_the_prompt_and_sample_with_the_last() -> None:
    one = sequence(list(range(10, 20)), num_logprobs=2)
    one.blocks = [7, 8, 9]
    first = one.chunk(6, 4, 0)
    assert (first.token_ids, first.start, first.blocks) == ([10, 11, 12, 13, 14, 15], 0, [7, 8])
    assert first.sample is None
    one.advance(first, ChunkResult())
    last = one.chunk(4, 4, 0)
    assert (last.token_ids, last.start, last.blocks) == ([16, 17, 18, 19], 6, [7, 8, 9])
    assert last.sample is not None
    assert (last.sample.position, last.sample.num_logprobs) == (10, 2)
    item = one.advance(last, ChunkResult(token_ids=(42,)))
    assert (item.num_computed_before, item.num_computed_after, item.num_tokens) == (6, 10, 4)
    one.check(4)
    step = one.chunk(1, 4, 0)
    assert (step.token_ids, step.start) == ([42], 10)
    assert step.sample is not None and step.sample.position == 11


def test_stop_tokens_are_masked_until_the_minimum_counting_resumed_outputs() -> None:
    stopping = StoppingParams(
        max_new_tokens=9,
        min_new_tokens=3,
        eos_token_ids=frozenset({1}),
        stop_token_ids=frozenset({2}),
    )
    one = sequence([5, 6], stopping=stopping, output_token_ids=[7, 8], num_logprobs=None)
    one.blocks = [0]
    chunk = one.chunk(4, 8, 0)
    assert chunk.sample is not None
    assert chunk.sample.masked_token_ids == {1, 2}
    assert list(chunk.sample.output_token_ids) == [7, 8]
    one.advance(chunk, ChunkResult(token_ids=(9,)))
    following = one.chunk(1, 8, 0)
    assert following.sample is not None and following.sample.masked_token_ids == frozenset()


def test_prompt_logprobs_ask_for_every_next_prompt_token_once() -> None:
    one = sequence([10, 11, 12, 13, 14], num_prompt_logprobs=3)
    one.blocks = [0, 1]
    asked: list[int] = []
    for num_tokens in (2, 2, 1):
        chunk = one.chunk(num_tokens, 4, 0)
        assert chunk.prompt_logprobs == (3 if chunk.next_token_ids else None)
        asked += chunk.next_token_ids
        one.advance(chunk, ChunkResult())
    assert asked == [11, 12, 13, 14]


def test_several_seeds_append_nothing() -> None:
    one = sequence([1, 2], seeds=(3, 4))
    one.blocks = [0]
    one.advance(one.chunk(2, 4, 0), ChunkResult(token_ids=(8, 9)))
    assert one.token_ids == [1, 2]


def test_a_chunk_beyond_tokens_or_blocks_is_our_bug() -> None:
    one = sequence([1, 2, 3, 4, 5])
    one.blocks = [0]
    for num_tokens in (0, 5, 6):
        with pytest.raises(AssertionError):
            one.chunk(num_tokens, 4, 0)
    one.num_computed = 5
    with pytest.raises(AssertionError, match="nothing left to compute"):
        one.check(8)


def test_empty_prompt_or_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt_token_ids is empty"):
        sequence([])
    with pytest.raises(ValueError, match="seeds is empty"):
        sequence([1], seeds=())
