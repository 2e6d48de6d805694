"""The digest of KV blocks on a GPU: the twin's bits, at real sizes and far offsets."""

from __future__ import annotations

import pytest
import torch

from kernels.block_digest import block_digest

pytestmark = pytest.mark.gpu

BLOCK_NUM_BYTES = 9 * 2**20  # 64 tokens of Qwen3-8B


def random_arena(num_blocks: int, num_bytes: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(3)
    shape = (num_blocks, num_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)


@pytest.mark.parametrize("num_bytes", [8, 4096, 65_536 + 24, BLOCK_NUM_BYTES])
def test_the_kernel_is_the_twin(num_bytes: int) -> None:
    arena = random_arena(3, num_bytes)
    assert block_digest(arena) == block_digest(arena.cpu())


def test_blocks_are_chosen_by_id_beyond_two_gibibytes() -> None:
    """More than 2 ** 31 bytes, and more than 2 ** 31 words would need 16 GiB: strides are int64."""
    arena = random_arena(300, BLOCK_NUM_BYTES)
    chosen = [299, 0, 17, 299]
    expected = block_digest(arena[chosen].cpu())
    assert block_digest(arena, chosen) == expected
    assert block_digest(arena, torch.tensor(chosen, device="cuda")) == expected
    assert block_digest(arena)[299] == expected[0]


def test_many_small_blocks() -> None:
    arena = random_arena(70_000, 64)
    digests = block_digest(arena)
    assert digests[-5:] == block_digest(arena[-5:].cpu())
    assert len(set(digests)) == len(digests)
