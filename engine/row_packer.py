"""Packs sample requests into the words and tensors that the row sampler reads.

Owns what of a request stays between steps: its parameters' words, its dense bias, its counts of
seen tokens (kept up by the device while steps are in flight). Never launches the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.plan import SampleRequest, SamplingParams
from engine.sampler import last_resort
from kernels.sample_format import HEADER, MAX_TOP, PROMPT_BIT, Field, Flag, SampleBuffers

_NUM_FIELDS = int(Field.NUM_FIELDS)
_LIST_WORDS = 128
_SMALLEST_TEMPERATURE = 1e-30
_KEPT_STEPS = 32
"""Packings after which what belongs to a request that is not seen any more is given up."""


def limited_top(num_top: int, vocab_size: int) -> int:
    """Alternatives that there are; ValueError for more than the kernel reports."""
    if num_top > MAX_TOP:
        raise ValueError(f"num_logprobs: {num_top}; limit {MAX_TOP}")
    return min(num_top, vocab_size)


def list_words(max_rows: int) -> int:
    """Words of room for barred ids: stop tokens and EOS of every row, were they all different."""
    return _LIST_WORDS * max_rows


@dataclass(slots=True, kw_only=True)
class _Template:
    """What the words of all rows with the same parameters object have in common."""

    params: SamplingParams
    place: int
    bias: Tensor | None
    counts_outputs: bool
    step: int = 0


@dataclass(slots=True, kw_only=True)
class _Counts:
    """Seen tokens of one sequence, int32 [vocab_size]; num_outputs are counted or on their way."""

    output_token_ids: Sequence[int]
    words: Tensor
    num_outputs: int
    step: int = 0


class RowPacker:
    """Words of one sampler's rows. Requests are told apart by their list of outputs.

    Bias and counts (4 bytes a token of the vocabulary each) exist only for requests that use them;
    they are built with a few small kernels on the current stream when such a request is first seen.
    """

    def __init__(self, buffers: SampleBuffers) -> None:
        self._buffers = buffers
        self._vocab_size = buffers.vocab_size
        self._device = buffers.control.device
        self._templates: dict[int, _Template] = {}
        self._words = np.zeros((64, _NUM_FIELDS), np.int32)
        self._free = list(range(len(self._words)))
        self._counts: dict[int, _Counts] = {}
        self._step = 0

    def pack(
        self, rows: Sequence[SampleRequest], logits_rows: Sequence[int], target: np.ndarray
    ) -> int:
        """Writes the control words of rows, one per seed, into target; how many words they are.

        ValueError when rows or their barred ids do not fit.
        """
        self._step += 1
        templates = [self._template(row.params) for row in rows]
        places = [t.place for t, row in zip(templates, rows, strict=True) for _ in row.seeds]
        num_rows = len(places)
        if num_rows > self._buffers.max_rows:
            raise ValueError(f"rows: {num_rows} with all seeds; limit {self._buffers.max_rows}")
        end = HEADER + num_rows * _NUM_FIELDS
        words = target[HEADER:end].reshape(num_rows, _NUM_FIELDS)
        words[:] = self._words[places]
        expanded = [(i, row) for i, row in enumerate(rows) for _ in row.seeds]
        words[:, Field.LOGITS_ROW] = [logits_rows[i] for i, _ in expanded]
        words[:, Field.POSITION] = [row.position for _, row in expanded]
        seeds = np.array([seed for row in rows for seed in row.seeds], np.uint64)
        words[:, Field.SEED : Field.SEED + 2] = seeds.view(np.int32).reshape(-1, 2)
        lists: dict[frozenset[int], int] = {}
        for place, (i, row) in enumerate(expanded):
            template = templates[i]
            if template.counts_outputs:
                self._point_at_counts(words[place], row)
            if row.masked_token_ids:
                end = _bar(words[place], row, lists, target, end)
            if row.num_logprobs is not None:
                words[place, Field.FLAGS] |= int(Flag.LOGPROBS)
                words[place, Field.NUM_TOP] = limited_top(row.num_logprobs, self._vocab_size)
        target[0] = num_rows
        self._forget()
        return end

    def _template(self, params: SamplingParams) -> _Template:
        found = self._templates.get(id(params))
        if found is None:
            found = self._templates[id(params)] = self._new_template(params)
        found.step = self._step
        return found

    def _new_template(self, params: SamplingParams) -> _Template:
        if not self._free:
            size = len(self._words)
            self._words = np.concatenate([self._words, np.zeros_like(self._words)])
            self._free = list(range(size, 2 * size))
        place = self._free.pop()
        counts_outputs = bool(
            params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        )
        bias = self._bias(params)
        words = self._words[place]
        words[:] = 0
        floats = words.view(np.float32)
        floats[Field.TEMPERATURE] = _temperature(params.temperature)
        words[Field.TOP_K] = params.top_k if params.top_k < self._vocab_size else 0
        floats[Field.TOP_P] = params.top_p
        floats[Field.LEAST] = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
        floats[Field.REPETITION] = params.repetition_penalty
        floats[Field.PRESENCE] = params.presence_penalty
        floats[Field.FREQUENCY] = params.frequency_penalty
        words[Field.TOKEN] = last_resort(params, frozenset())
        if counts_outputs or bias is not None:
            words[Field.FLAGS] = int(Flag.ADJUSTED)
        if bias is not None:
            _set_address(words, Field.BIAS, bias)
            self._buffers.states[bias.data_ptr()] = bias
        return _Template(params=params, place=place, bias=bias, counts_outputs=counts_outputs)

    def _bias(self, params: SamplingParams) -> Tensor | None:
        """fp32 [vocab_size]: the bias, and -inf where a token is not allowed or bad."""
        if not (params.logit_bias or params.allowed_token_ids or params.bad_token_ids):
            return None
        bias = np.zeros(self._vocab_size, np.float32)
        for token_id, value in params.logit_bias:
            bias[token_id] = value
        if params.allowed_token_ids:
            allowed = list(params.allowed_token_ids)
            values = bias[allowed]
            bias[:] = -math.inf
            bias[allowed] = values
        bias[list(params.bad_token_ids)] = -math.inf
        return self._upload(torch.from_numpy(bias))

    def _point_at_counts(self, words: np.ndarray, row: SampleRequest) -> None:
        """Gives the row its sequence's counts; one seed's token will be added to them."""
        num_outputs = row.position - len(row.prompt_token_ids)
        counts = self._counts.get(id(row.output_token_ids))
        if counts is None or counts.num_outputs != num_outputs:
            assert not row.num_pending, "counts of a sequence with a token in flight are gone"
            counts = self._new_counts(row, num_outputs)
        counts.step = self._step
        _set_address(words, Field.COUNTS, counts.words)
        if len(row.seeds) == 1:
            words[Field.FLAGS] |= int(Flag.COUNTED)
            counts.num_outputs = num_outputs + 1

    def _new_counts(self, row: SampleRequest, num_outputs: int) -> _Counts:
        old = self._counts.pop(id(row.output_token_ids), None)
        if old is not None:
            del self._buffers.states[old.words.data_ptr()]
        outputs = np.array(row.output_token_ids[:num_outputs], np.int64)
        words = np.bincount(outputs, minlength=self._vocab_size).astype(np.int32)
        words[np.unique(np.array(row.prompt_token_ids, np.int64))] |= PROMPT_BIT
        tensor = self._upload(torch.from_numpy(words))
        counts = _Counts(
            output_token_ids=row.output_token_ids, words=tensor, num_outputs=num_outputs
        )
        self._counts[id(row.output_token_ids)] = counts
        self._buffers.states[tensor.data_ptr()] = tensor
        return counts

    def _upload(self, values: Tensor) -> Tensor:
        if self._device.type == "cuda":
            values = values.pin_memory()
        return values.to(self._device, non_blocking=True, copy=True)

    def _forget(self) -> None:
        """Gives up what no request of the last steps used; memory returns in stream order."""
        if self._step % _KEPT_STEPS:
            return
        oldest = self._step - _KEPT_STEPS
        states = self._buffers.states
        for key in [k for k, c in self._counts.items() if c.step < oldest]:
            del states[self._counts.pop(key).words.data_ptr()]
        for key in [k for k, t in self._templates.items() if t.step < oldest]:
            template = self._templates.pop(key)
            self._free.append(template.place)
            if template.bias is not None:
                del states[template.bias.data_ptr()]


def given_words(token_ids: Sequence[int], num_top: int, target: np.ndarray) -> int:
    """Control words that ask for the log probabilities of token_ids, row i from logits row i."""
    num_rows = len(token_ids)
    end = HEADER + num_rows * _NUM_FIELDS
    words = target[HEADER:end].reshape(num_rows, _NUM_FIELDS)
    words[:] = 0
    words[:, Field.LOGITS_ROW] = np.arange(num_rows)
    words[:, Field.FLAGS] = int(Flag.LOGPROBS | Flag.GIVEN)
    words[:, Field.TOKEN] = token_ids
    words[:, Field.NUM_TOP] = num_top
    target[0] = num_rows
    return end


def _bar(
    words: np.ndarray,
    row: SampleRequest,
    lists: dict[frozenset[int], int],
    target: np.ndarray,
    end: int,
) -> int:
    """Writes the row's barred ids behind `end`, once per set; the new end."""
    barred = row.masked_token_ids
    if barred not in lists:
        if end + len(barred) > len(target):
            raise ValueError(f"masked_token_ids: more than {len(target)} words for all rows")
        target[end : end + len(barred)] = sorted(barred)
        lists[barred] = end
        end += len(barred)
    words[Field.BARRED] = lists[barred]
    words[Field.NUM_BARRED] = len(barred)
    words[Field.TOKEN] = last_resort(row.params, barred)
    words[Field.FLAGS] |= int(Flag.ADJUSTED)
    return end


def _temperature(temperature: float) -> float:
    return max(temperature, _SMALLEST_TEMPERATURE) if temperature > 0.0 else 0.0


def _set_address(words: np.ndarray, place: int, tensor: Tensor) -> None:
    words[place : place + 2] = np.array([tensor.data_ptr()], np.uint64).view(np.int32)
