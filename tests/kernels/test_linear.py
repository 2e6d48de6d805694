"""Matrix product: a row's bits depend on the row and the weight alone, whatever the threads."""

from __future__ import annotations

import pytest
import torch

from kernels import ops
from kernels.linear import TILES

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((192, 64), (512, 256), (64, 176), (100, 72))


@pytest.fixture(autouse=True, params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.param)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_rows(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    tiles = ops.exact_tiles(weight)
    x = torch.randn(300, shape[1]).to(dtype)
    whole = ops.linear(x, weight, bias, tiles=tiles)
    every = range(1, 301)
    few = (*range(1, 18), 63, 64, 65, 100, 150)  # threads wait for each other on a busy machine
    for num_rows in every if torch.get_num_threads() == 1 else few:
        part = ops.linear(x[:num_rows], weight, bias, tiles=tiles)
        assert torch.equal(part, whole[:num_rows]), num_rows


def test_bits_do_not_depend_on_mates_or_place(dtype: torch.dtype) -> None:
    weight = torch.randn(512, 256).to(dtype)
    tiles = ops.exact_tiles(weight)
    row = torch.randn(256).to(dtype)
    alone = ops.linear(row[None], weight, tiles=tiles)[0]
    for num_rows in (4, 5, 16, 17, 64, 83, 150):
        for place in {0, 1, num_rows // 2, num_rows - 1}:
            x = torch.randn(num_rows, 256).to(dtype) * 100
            x[place] = row
            assert torch.equal(ops.linear(x, weight, tiles=tiles)[place], alone), (num_rows, place)


def test_every_subset_of_tiles_gives_the_result_of_the_widest(dtype: torch.dtype) -> None:
    weight, x = torch.randn(192, 64).to(dtype), torch.randn(77, 64).to(dtype)
    expected = ops.linear(x, weight, tiles=TILES[:1])
    for tile in ops.exact_tiles(weight):
        assert torch.equal(ops.linear(x, weight, tiles=(tile,)), expected)
    assert ops.exact_tiles(weight)[0] == TILES[0]


def test_values_are_a_matrix_product(dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(96, 64), torch.randn(96), torch.randn(9, 64)
    out = ops.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    assert out.dtype == dtype and out.shape == (9, 96)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.3)
    exact = ops.linear(x, weight, bias)
    torch.testing.assert_close(exact, expected)
