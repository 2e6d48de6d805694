"""Turns a step's logits into tokens and log probabilities, row by row as each request asks.

Owns the order of sampling: bias, masks, penalties, (log probabilities from here,) temperature,
top-k, top-p, min-p, draw. Never owns requests; random numbers are a function of (seed, position).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.plan import PositionLogprobs, SampleRequest, SamplingParams, TokenLogprob
from kernels import sampling

Sampled = tuple[tuple[int, ...], tuple[PositionLogprobs, ...]]


class LogitsError(ArithmeticError):
    """A row of logits holds NaN or +inf: no distribution can be read from it."""


class Sampler:
    """Samples for one vocabulary on one device; stateless but for a table of token hashes."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._hashes = sampling.token_hashes(vocab_size, torch.device(device))

    def sample(self, logits: Tensor, rows: list[SampleRequest]) -> list[Sampled]:
        """Returns per row one token per seed and, when asked for, as many log probabilities.

        logits [num_rows, vocab_size] float32 is left as it is; row i serves rows[i]. Raises
        ValueError for a wrong shape, LogitsError for NaN or +inf.
        """
        if logits.shape != (len(rows), self._vocab_size):
            raise ValueError(
                f"logits: shape {tuple(logits.shape)}; expected {(len(rows), self._vocab_size)}"
            )
        if not rows:
            return []
        values, token_ids = sampling.argmax_rows(logits)
        chosen = token_ids.tolist()
        adjusted = {i: _adjusted(logits[i], row) for i, row in enumerate(rows) if _adjusts(row)}
        for i, value in enumerate(values.tolist()):
            if not value < math.inf:
                raise LogitsError(f"logits of row {i}: largest value is {value}; must be finite")
            if value == -math.inf and i not in adjusted:
                adjusted[i] = _only(logits[i], 0)
        for i, row in adjusted.items():
            chosen[i] = int(sampling.argmax_rows(row[None])[1])
        tokens = [(token,) * len(row.seeds) for token, row in zip(chosen, rows, strict=True)]
        drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0.0]
        if drawn:
            stacked = torch.stack([adjusted.get(i, logits[i]) for i in drawn])
            new_tokens = self._draw(stacked, [rows[i] for i in drawn])
            for i, ids in zip(drawn, new_tokens, strict=True):
                tokens[i] = ids
        return _with_logprobs(logits, adjusted, rows, tokens)

    def prompt_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], num_top: int
    ) -> list[PositionLogprobs]:
        """Log probabilities of token_ids [n] under logits [n, vocab_size], num_top best each."""
        return _position_logprobs(logits, list(token_ids), [num_top] * len(token_ids))

    def _draw(self, logits: Tensor, rows: list[SampleRequest]) -> list[tuple[int, ...]]:
        """One draw per seed of each row of logits [num_rows, vocab_size]."""
        scaled = sampling.scale(logits, [row.params.temperature for row in rows])
        for values, row in zip(scaled, rows, strict=True):
            params = row.params
            if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0:
                sampling.filter_row(values, params.top_k, params.top_p, params.min_p)
        keys = [sampling.stream_key(seed, row.position) for row in rows for seed in row.seeds]
        if len(keys) > len(rows):
            repeats = torch.tensor([len(row.seeds) for row in rows], device=scaled.device)
            scaled = scaled.repeat_interleave(repeats, dim=0)
        drawn = iter(sampling.draw(scaled, sampling.gumbel_noise(self._hashes, keys)).tolist())
        return [tuple(next(drawn) for _ in row.seeds) for row in rows]


def _with_logprobs(
    logits: Tensor,
    adjusted: dict[int, Tensor],
    rows: list[SampleRequest],
    tokens: list[tuple[int, ...]],
) -> list[Sampled]:
    places = [
        (i, token_id)
        for i, row in enumerate(rows)
        if row.num_logprobs is not None
        for token_id in tokens[i]
    ]
    if not places:
        return [(ids, ()) for ids in tokens]
    stacked = torch.stack([adjusted.get(i, logits[i]) for i, _ in places])
    num_top = [rows[i].num_logprobs or 0 for i, _ in places]
    values = iter(_position_logprobs(stacked, [token_id for _, token_id in places], num_top))
    return [
        (ids, tuple(next(values) for _ in ids) if row.num_logprobs is not None else ())
        for ids, row in zip(tokens, rows, strict=True)
    ]


def _adjusts(row: SampleRequest) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.allowed_token_ids
        or params.bad_token_ids
        or row.masked_token_ids
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
    )


def _adjusted(logits: Tensor, row: SampleRequest) -> Tensor:
    """A copy of logits [vocab_size] after bias, masks and penalties.

    When nothing is left, only the lowest token of `allowed_token_ids` that the fewest other masks
    bar is possible (token 0 without such a list).
    """
    params = row.params
    values = logits.clone()
    sampling.apply_bias(values, params.logit_bias)
    barred = sorted(row.masked_token_ids.union(params.bad_token_ids))
    sampling.apply_masks(values, params.allowed_token_ids, barred)
    if params.repetition_penalty != 1.0:
        seen = [*row.prompt_token_ids, *row.output_token_ids]
        sampling.apply_repetition_penalty(values, seen, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        sampling.apply_output_penalties(
            values, row.output_token_ids, params.presence_penalty, params.frequency_penalty
        )
    if values.amax() == -math.inf:
        return _only(values, last_resort(params, row.masked_token_ids))
    return values


def last_resort(params: SamplingParams, masked: frozenset[int]) -> int:
    """The token that stays when every one is barred: the lowest of the least barred allowed."""
    allowed = set(params.allowed_token_ids)
    bad = set(params.bad_token_ids)
    for candidates in (allowed - masked - bad, allowed - bad, allowed):
        if candidates:
            return min(candidates)
    return 0


def _only(values: Tensor, token_id: int) -> Tensor:
    """A distribution like values [vocab_size] in which only token_id is possible."""
    only = torch.full_like(values, -math.inf)
    only[token_id] = 0.0
    return only


def _position_logprobs(
    logits: Tensor, token_ids: list[int], num_top: list[int]
) -> list[PositionLogprobs]:
    """One value per row of logits [num_rows, vocab_size]; ties are ordered by lowest id."""
    if not token_ids:
        return []
    chosen = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    norms = sampling.log_normalizers(logits)
    logprobs = (logits.gather(1, chosen[:, None])[:, 0].double() - norms).tolist()
    places = sampling.ranks(logits, chosen).tolist()
    widest = min(max(num_top), logits.shape[-1])
    best_ids: list[list[int]] = [[]] * len(token_ids)
    best_logprobs: list[list[float]] = [[]] * len(token_ids)
    if widest:
        best = torch.topk(sampling.order_keys(logits), widest, dim=-1).indices
        best_ids = best.tolist()
        best_logprobs = (logits.gather(1, best).double() - norms[:, None]).tolist()
    return [
        PositionLogprobs(
            chosen=TokenLogprob(token_id=token_ids[i], logprob=logprobs[i], rank=places[i]),
            top=_top(best_ids[i][: num_top[i]], best_logprobs[i]),
        )
        for i in range(len(token_ids))
    ]


def _top(token_ids: list[int], logprobs: list[float]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token_id=token_id, logprob=logprobs[place], rank=place)
        for place, token_id in enumerate(token_ids)
    )
