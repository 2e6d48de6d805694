"""The arithmetic of sampling: noise, order keys, filters."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import sampling

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_noise_is_standard_gumbel_and_finite() -> None:
    hashes = sampling.token_hashes(4096, CPU)
    keys = [sampling.stream_key(seed, 9) for seed in range(64)]
    noise = -sampling.gumbel_noise(hashes, keys).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    # Kolmogorov-Smirnov against exp(-exp(-x)); 1.95 / sqrt(n) is the 0.1 % point.
    ordered = noise.flatten().sort().values
    place = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert (place - torch.exp(-torch.exp(-ordered))).abs().max() < 1.95 / math.sqrt(len(ordered))


def test_noise_of_neighbouring_streams_is_uncorrelated() -> None:
    hashes = sampling.token_hashes(4096, CPU)
    keys = [sampling.stream_key(seed, position) for seed in range(8) for position in range(8)]
    correlation = torch.corrcoef(sampling.gumbel_noise(hashes, keys))
    off_diagonal = correlation - torch.eye(len(keys))
    assert off_diagonal.abs().max() < 5 / math.sqrt(4096)


def test_noise_does_not_depend_on_vocabulary_or_batch() -> None:
    keys = [sampling.stream_key(seed, 1) for seed in range(5)]
    wide = sampling.gumbel_noise(sampling.token_hashes(1000, CPU), keys)
    alone = sampling.gumbel_noise(sampling.token_hashes(1000, CPU), keys[3:4])
    assert torch.equal(wide[3], alone[0])
    assert wide.shape[1] % sampling.ROW_MULTIPLE == 0


def test_stream_keys_differ_for_every_seed_and_position() -> None:
    keys = {sampling.stream_key(seed, p) for seed in (*range(50), 2**64 - 1) for p in range(50)}
    assert len(keys) == 51 * 50
    assert all(0 <= first < 2**32 and second % 2 == 1 for first, second in keys)


def test_order_keys_order_by_value_then_lowest_index() -> None:
    values = torch.tensor([0.0, -0.0, 2.0, -3.0, 2.0, -math.inf, 1e-30, -1e-30])
    order = sampling.order_keys(values).argsort(descending=True).tolist()
    assert order == [2, 4, 6, 0, 1, 7, 3, 5]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "num_kept"),
    [
        (0, 1.0, 0.0, 6),
        (2, 1.0, 0.0, 2),
        (99, 1.0, 0.0, 6),
        (0, 0.5, 0.0, 2),
        (0, 1e-9, 0.0, 1),
        (0, 1.0, 0.51, 3),
        (0, 1.0, 1.0, 1),
        (4, 0.6, 0.0, 2),
        (3, 0.9, 0.9, 1),
        (0, 0.999, 0.0, 6),
    ],
)
def test_filters_keep_a_prefix_of_the_order(
    top_k: int, top_p: float, min_p: float, num_kept: int
) -> None:
    probs = torch.tensor([0.05, 0.3, 0.2, 0.05, 0.25, 0.15])
    scaled = (probs / probs.max()).log()
    sampling.filter_row(scaled, top_k, top_p, min_p)
    order = [1, 4, 2, 5, 0, 3]
    assert (scaled > -math.inf).nonzero().flatten().tolist() == sorted(order[:num_kept])


def test_top_p_of_a_flat_distribution_looks_beyond_the_first_tokens() -> None:
    scaled = torch.zeros(10_000)
    sampling.filter_row(scaled, 0, 0.75, 0.0)
    assert abs(int((scaled == 0).sum()) - 7500) <= 1
    assert (scaled[:7499] == 0).all()
