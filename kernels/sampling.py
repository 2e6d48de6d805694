"""Choosing tokens from logits: adjustments, filters, counter-based noise, ranks (torch twin).

Owns the arithmetic of sampling on any device. Never knows requests, and never lets one row's bits
depend on another row: comparisons, integer work and single IEEE operations run over the whole
batch, while exp, log and sums (whose bits depend on where an element lies in a vector) run row by
row on rows of equal length and alignment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ROW_MULTIPLE = 64
"""Rows of noise are padded to this many elements, so that all of them start equally aligned."""

_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1
_SMALLEST_TEMPERATURE = 1e-30
_LARGEST_UNIFORM = 1.0 - 2.0**-24
_FIRST_WIDTH = 256


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest value and its lowest index, of logits [num_rows, vocab_size].

    A NaN anywhere in a row comes back as that row's value.
    """
    return torch.max(logits, dim=-1)


def apply_bias(row: Tensor, bias: Sequence[tuple[int, float]]) -> None:
    """Adds to single tokens' logits of row [vocab_size] in place; ids must be distinct."""
    if bias:
        ids = _ids((token_id for token_id, _ in bias), row)
        row[ids] += torch.tensor([value for _, value in bias], dtype=row.dtype, device=row.device)


def apply_masks(row: Tensor, allowed: Sequence[int], barred: Sequence[int]) -> None:
    """Sets row [vocab_size] to -inf outside `allowed` (when not empty) and at `barred`."""
    if allowed:
        kept = _ids(allowed, row)
        values = row[kept]
        row.fill_(-math.inf)
        row[kept] = values
    if barred:
        row[_ids(barred, row)] = -math.inf


def apply_repetition_penalty(row: Tensor, seen: Sequence[int], penalty: float) -> None:
    """Divides the positive logits of seen tokens by penalty, multiplies the others; in place."""
    if seen:
        ids = torch.unique(_ids(seen, row))
        values = row[ids]
        row[ids] = torch.where(values > 0, values / penalty, values * penalty)


def apply_output_penalties(
    row: Tensor, output: Sequence[int], presence: float, frequency: float
) -> None:
    """Subtracts presence once and frequency per occurrence for each token in output, in place."""
    if output:
        ids, counts = torch.unique(_ids(output, row), return_counts=True)
        row[ids] -= counts.to(row.dtype) * frequency + presence


def scale(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """(logits - largest) / temperature: [num_rows, vocab_size], each row's largest value 0.

    Subtracting first keeps any positive temperature finite.
    """
    divisors = [max(temperature, _SMALLEST_TEMPERATURE) for temperature in temperatures]
    divisor = torch.tensor(divisors, dtype=logits.dtype, device=logits.device)
    return (logits - logits.amax(dim=-1, keepdim=True)) / divisor[:, None]


def order_keys(values: Tensor) -> Tensor:
    """int64 keys of values [..., vocab_size], no two equal: ordered by value, then lowest index."""
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(values.shape[-1], device=values.device)
    return (ordered.to(torch.int64) << 32) + (_MASK32 - index)


def filter_row(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """Sets to -inf in place what top-k, top-p and min-p leave out of scaled [vocab_size].

    The kept tokens are always the first n in the order (most likely, then lowest id): n is top_k,
    then the fewest of those whose mass reaches top_p of theirs, then those with at least min_p
    times the largest probability. The first token always stays. The largest value must be 0.
    """
    vocab_size = scaled.shape[-1]
    num_kept = min(top_k, vocab_size) if top_k > 0 else vocab_size
    num_likely = vocab_size
    if min_p > 0.0:
        num_likely = max(1, int((scaled >= math.log(min_p)).sum()))
    if top_p >= 1.0 and num_kept == vocab_size == num_likely:
        return
    keys = order_keys(scaled)
    if top_p < 1.0:
        num_kept = _nucleus_size(scaled, keys, num_kept, top_p)
    num_kept = min(num_kept, num_likely)
    if num_kept < vocab_size:
        least = torch.topk(keys, num_kept, sorted=False).values.amin()
        scaled.masked_fill_(keys < least, -math.inf)


def _nucleus_size(scaled: Tensor, keys: Tensor, limit: int, top_p: float) -> int:
    """How many of the `limit` most likely tokens top-p keeps; looks further only as needed."""
    total = scaled.clone().exp_().sum() if limit == scaled.shape[-1] else None
    width = limit if total is None else min(limit, _FIRST_WIDTH)
    while True:
        leading = scaled[torch.topk(keys, width).indices].exp()
        mass = leading.cumsum(0)
        num_short = int((mass < top_p * (mass[-1] if total is None else total)).sum())
        if num_short < width:
            return num_short + 1
        if width == limit:
            return limit
        width = min(limit, width * 16)


def stream_key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys, the second odd: a function of (seed uint64, position) alone."""
    state = _mix64((seed + 0x9E3779B97F4A7C15) & _MASK64)
    state = _mix64(state ^ _mix64((position * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & _MASK64))
    return state & _MASK32, (state >> 32) | 1


def token_hashes(vocab_size: int, device: torch.device) -> Tensor:
    """int32 hash of every token id, padded to ROW_MULTIPLE: the constant half of the noise."""
    padded = -(-vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE
    return _mix32(torch.arange(padded, dtype=torch.int32, device=device))


def gumbel_noise(hashes: Tensor, keys: Sequence[tuple[int, int]]) -> Tensor:
    """Minus standard Gumbel noise, log(-log(1 - v)): [num_keys, padded_vocab_size] float32.

    v in (0, 1) is the upper 31 bits of mix32((token_hash ^ key0) * key1); a GPU kernel can
    recompute it per element.
    """
    pairs = [[_signed32(first), _signed32(second)] for first, second in keys]
    key = torch.tensor(pairs, dtype=torch.int32, device=hashes.device)
    bits = _mix32((hashes[None, :] ^ key[:, :1]) * key[:, 1:])
    bits = (bits >> 1) & 0x7FFFFFFF  # not negative, so that small v keep their full precision
    noise = ((bits.to(torch.float32) + 0.5) * 2.0**-31).clamp_(max=_LARGEST_UNIFORM).neg_()
    for row in noise:
        row.log1p_().neg_().log_()
    return noise


def draw(scaled: Tensor, noise: Tensor) -> Tensor:
    """Gumbel-max: one token id per row of scaled [num_draws, vocab_size]; lowest id wins ties."""
    return torch.max(scaled - noise[:, : scaled.shape[-1]], dim=-1).indices


def log_normalizers(logits: Tensor) -> Tensor:
    """log(sum(exp(row))) of logits [num_rows, vocab_size], float64, each row on its own."""
    return torch.stack([torch.logsumexp(row.clone(), dim=0) for row in logits]).double()


def ranks(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Zero-based place of token_ids [num_rows] in their rows; ties count by lowest id first."""
    value = logits.gather(1, token_ids[:, None])
    index = torch.arange(logits.shape[-1], device=logits.device)
    ahead = (logits > value) | ((logits == value) & (index < token_ids[:, None]))
    return ahead.sum(dim=-1)


def _ids(ids: Iterable[int], row: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=row.device)


def _mix64(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix32(value: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser over int32 with wrap-around (Appleby 2011)."""
    value = (value ^ ((value >> 16) & 0xFFFF)) * _signed32(0x85EBCA6B)
    value = (value ^ ((value >> 13) & 0x7FFFF)) * _signed32(0xC2B2AE35)
    return value ^ ((value >> 16) & 0xFFFF)


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
