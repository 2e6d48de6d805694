"""The digest kernel, in the interpreter, equals the twin bit for bit; blocks chosen by id."""

from __future__ import annotations

import pytest
import torch

from kernels import block_digest as module
from kernels.block_digest import block_digest


def launch(blocks: torch.Tensor, block_ids: list[int] | torch.Tensor | None = None) -> list[int]:
    words = blocks.view(torch.int64)
    totals = module._launch_triton(words, block_ids, step_words=64, num_steps=2)
    return [total % 2**64 for total in totals.tolist()]


@pytest.mark.parametrize("num_bytes", [8, 64, 1024, 128 * 8 + 24])
def test_the_kernel_is_the_twin(num_bytes: int) -> None:
    blocks = torch.randint(0, 256, (3, num_bytes), dtype=torch.uint8)
    assert launch(blocks) == block_digest(blocks)


@pytest.mark.parametrize("block_ids", [[4, 0, 4], torch.tensor([2]), []], ids=str)
def test_blocks_are_chosen_by_id(block_ids: list[int] | torch.Tensor) -> None:
    arena = torch.randint(0, 256, (5, 512), dtype=torch.uint8)
    every = block_digest(arena)
    expected = [every[block] for block in block_ids]
    assert block_digest(arena, block_ids) == expected
    assert launch(arena, block_ids) == expected


def test_rows_of_an_arena_keep_its_stride() -> None:
    arena = torch.randint(0, 256, (4, 1024), dtype=torch.uint8)
    assert launch(arena[:, :512]) == block_digest(arena[:, :512].contiguous())


def test_an_id_outside_the_arena_is_refused() -> None:
    with pytest.raises(ValueError, match="block_ids"):
        block_digest(torch.zeros(2, 8, dtype=torch.uint8), [0, 2])


def test_rows_must_be_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        block_digest(torch.zeros(8, 16, dtype=torch.uint8).t())
