"""Samples a step's rows on the device, without the host between logits and the next step's input.

Owns the sampler's device buffers, the pinned memory around them and the way from results to
tokens and log probabilities. Never owns requests: engine/row_packer.py keeps what outlives a step.

A step calls, in order: `prepare` (host only, while earlier steps run; bias and counts of requests
seen for the first time are built on the current stream), `send` (one copy to the device, behind
earlier steps on the stream and ahead of the model), `launch` (one kernel, which a CUDA graph may
hold: its arguments never change), `fetch` (copies to the host), and later `collect`. `tokens`
keeps the tokens on the device until the next launch, for the next step's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.plan import PositionLogprobs, SampleRequest, TokenLogprob
from engine.row_packer import RowPacker, given_words, limited_top, list_words
from engine.sampler import LogitsError, Sampled
from kernels.sample_format import SampleBuffers, Status
from kernels.sample_rows import sample_rows

_LOGPROB_ROWS = 64
_BAD, _EMPTY = int(Status.BAD), int(Status.EMPTY)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRows:
    """Rows packed for one launch. The tokens of rows[i] stand at places[i] and after, per seed."""

    rows: tuple[SampleRequest, ...]
    places: tuple[int, ...]
    num_rows: int
    num_words: int
    has_top: bool
    mirror: _Mirror


class GpuSampler:
    """Samples for one vocabulary, at most max_rows seeds a step, on one stream.

    Bits of a row depend on its own logits, parameters, seed, position and tokens alone. Tokens are
    those of engine.sampler.Sampler, except where rounding decides between two of them.
    """

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        device: torch.device | str,
        *,
        block: int | None = None,
    ) -> None:
        device = torch.device(device)
        sizes = {} if block is None else {"block": block}
        self._buffers = SampleBuffers.allocate(
            vocab_size, max_rows, device, num_list_words=list_words(max_rows), **sizes
        )
        self._given: SampleBuffers | None = None
        self._packer = RowPacker(self._buffers)
        self._mirrors: list[_Mirror] = []

    @property
    def tokens(self) -> Tensor:
        """int32 [max_rows] on the device: the last launch's tokens, in the order of places."""
        return self._buffers.tokens

    def prepare(
        self, rows: Sequence[SampleRequest], logits_rows: Sequence[int] | None = None
    ) -> PreparedRows:
        """Packs one sample row per seed; rows[i] reads row logits_rows[i] (default i) of logits.

        ValueError for more rows than max_rows.
        """
        mirror = self._mirrors.pop() if self._mirrors else _Mirror(self._buffers)
        num_words = self._packer.pack(
            rows, range(len(rows)) if logits_rows is None else logits_rows, mirror.words
        )
        places: list[int] = []
        num_rows = 0
        for row in rows:
            places.append(num_rows)
            num_rows += len(row.seeds)
        return PreparedRows(
            rows=tuple(rows),
            places=tuple(places),
            num_rows=num_rows,
            num_words=num_words,
            has_top=any(row.num_logprobs for row in rows),
            mirror=mirror,
        )

    def send(self, prepared: PreparedRows) -> None:
        """Enqueues the copy of the packed rows to the device."""
        num_words = prepared.num_words
        self._buffers.control[:num_words].copy_(
            prepared.mirror.control[:num_words], non_blocking=True
        )

    def launch(self, logits: Tensor, num_rows: int, *, pdl: bool = False) -> None:
        """Enqueues the kernel over the rows sent, at most num_rows; see kernels.sample_rows."""
        sample_rows(logits, self._buffers, num_rows, pdl=pdl)

    def fetch(self, prepared: PreparedRows) -> None:
        """Enqueues the copies of the results to the host."""
        prepared.mirror.fetch(self._buffers, prepared.num_rows, has_top=prepared.has_top)

    def collect(self, prepared: PreparedRows) -> list[Sampled | LogitsError]:
        """Waits for the results; per row its tokens and log probabilities, or what was wrong."""
        mirror = prepared.mirror
        mirror.wait()
        report = mirror.report[: prepared.num_rows].tolist()
        logprobs = mirror.report[: prepared.num_rows].view(torch.float32)[:, 2].tolist()
        results: list[Sampled | LogitsError] = []
        for row, place in zip(prepared.rows, prepared.places, strict=True):
            token_id, status, _, _ = report[place]
            if len(row.seeds) == 1 and row.num_logprobs is None and not status & _BAD:
                results.append(((token_id,), ()))  # nearly every row of nearly every step
                continue
            span = slice(place, place + len(row.seeds))
            num_top = min(row.num_logprobs or 0, self._buffers.vocab_size)
            results.append(_result(row, span, report, logprobs, mirror.top, num_top))
        self._mirrors.append(mirror)
        return results

    def sample(self, logits: Tensor, rows: Sequence[SampleRequest]) -> list[Sampled | LogitsError]:
        """All of a step at once: row i of logits serves rows[i]; waits for the results."""
        if not rows:
            return []
        prepared = self.prepare(rows)
        self.send(prepared)
        self.launch(logits, prepared.num_rows)
        self.fetch(prepared)
        return self.collect(prepared)

    def prompt_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], num_top: int
    ) -> list[PositionLogprobs]:
        """Log probabilities of token_ids [n] under logits [n, vocab_size], num_top best each.

        Waits for the results. LogitsError for NaN or +inf.
        """
        if self._given is None:
            buffers = self._buffers
            self._given = SampleBuffers.allocate(
                buffers.vocab_size, _LOGPROB_ROWS, buffers.control.device, block=buffers.block
            )
        results: list[PositionLogprobs] = []
        num_top = limited_top(num_top, self._given.vocab_size)
        for start in range(0, len(token_ids), _LOGPROB_ROWS):
            part = slice(start, start + _LOGPROB_ROWS)
            results += self._given_logprobs(self._given, logits[part], token_ids[part], num_top)
        return results

    def _given_logprobs(
        self, buffers: SampleBuffers, logits: Tensor, token_ids: Sequence[int], num_top: int
    ) -> list[PositionLogprobs]:
        mirror, num_rows = _Mirror(buffers), len(token_ids)
        num_words = given_words(token_ids, num_top, mirror.words)
        buffers.control[:num_words].copy_(mirror.control[:num_words], non_blocking=True)
        sample_rows(logits, buffers, num_rows)
        mirror.fetch(buffers, num_rows, has_top=num_top > 0)
        mirror.wait()
        report = mirror.report[:num_rows].tolist()
        logprobs = mirror.report[:num_rows].view(torch.float32)[:, 2].tolist()
        if any(status & _BAD for _, status, _, _ in report):
            raise LogitsError("logits of a prompt hold NaN or +inf")
        return [_position(row, logprobs[i], mirror.top[i], num_top) for i, row in enumerate(report)]


class _Mirror:
    """Host memory of one launch, pinned beside a GPU: words to send, results that come back."""

    def __init__(self, buffers: SampleBuffers) -> None:
        is_cuda = buffers.control.is_cuda
        self.control, self.report, self.top = (
            torch.zeros(tensor.shape, dtype=torch.int32, pin_memory=is_cuda)
            for tensor in (buffers.control, buffers.report, buffers.top)
        )
        self.words: np.ndarray = self.control.numpy()
        self._done = torch.cuda.Event() if is_cuda else None

    def fetch(self, buffers: SampleBuffers, num_rows: int, *, has_top: bool) -> None:
        """Enqueues the copies of num_rows rows' results."""
        self.report[:num_rows].copy_(buffers.report[:num_rows], non_blocking=True)
        if has_top:
            self.top[:num_rows].copy_(buffers.top[:num_rows], non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        """Until the copies are here."""
        if self._done is not None:
            self._done.synchronize()


def _result(
    row: SampleRequest,
    span: slice,
    report: list[list[int]],
    logprobs: list[float],
    top: Tensor,
    num_top: int,
) -> Sampled | LogitsError:
    reports = report[span]
    if any(status & _BAD for _, status, _, _ in reports):
        return LogitsError(f"logits before position {row.position} hold NaN or +inf")
    token_ids = tuple(token_id for token_id, _, _, _ in reports)
    if row.num_logprobs is None:
        return token_ids, ()
    return token_ids, tuple(
        _position(report[i], logprobs[i], top[i], num_top) for i in range(span.start, span.stop)
    )


def _position(report: list[int], logprob: float, top: Tensor, num_top: int) -> PositionLogprobs:
    token_id, status, _, rank = report
    if status & _EMPTY:
        return _only(token_id, num_top)
    best = top[:num_top]
    ids, values = best[:, 0].tolist(), best[:, 1].view(torch.float32).tolist()
    return PositionLogprobs(
        chosen=TokenLogprob(token_id=token_id, logprob=logprob, rank=rank),
        top=tuple(
            TokenLogprob(token_id=best_id, logprob=value, rank=place)
            for place, (best_id, value) in enumerate(zip(ids, values, strict=True))
        ),
    )


def _only(token_id: int, num_top: int) -> PositionLogprobs:
    """The one possible token, then the others by lowest id."""
    others = (i for i in range(num_top + 1) if i != token_id)
    ids = [token_id, *others][:num_top]
    top = tuple(
        TokenLogprob(token_id=best_id, logprob=-math.inf if place else 0.0, rank=place)
        for place, best_id in enumerate(ids)
    )
    return PositionLogprobs(chosen=TokenLogprob(token_id=token_id, logprob=0.0, rank=0), top=top)
