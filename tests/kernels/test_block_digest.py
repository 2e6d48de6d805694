"""The digest sees every change of a block's bytes."""

from __future__ import annotations

import torch

from kernels.ops import block_digest


def digest(block: torch.Tensor) -> int:
    """Digest of one block of bytes."""
    return block_digest(block[None, :])[0]


def test_every_flipped_bit_changes_the_digest() -> None:
    block = torch.randint(0, 256, (512,), dtype=torch.uint8)
    whole = digest(block)
    for place in range(0, 512, 7):
        for bit in range(8):
            flipped = block.clone()
            flipped[place] ^= 1 << bit
            assert digest(flipped) != whole, (place, bit)


def test_order_and_zeros_matter() -> None:
    block = torch.randint(0, 256, (200_000,), dtype=torch.uint8)
    words = block.view(torch.int64)
    swapped = words.clone()
    swapped[[3, 20_000]] = words[[20_000, 3]]
    assert digest(swapped.view(torch.uint8)) != digest(block)
    shorter = block.clone()
    shorter[-64:] = 0
    assert digest(shorter) != digest(block)
    assert digest(torch.zeros(64, dtype=torch.uint8)) != digest(torch.zeros(72, dtype=torch.uint8))


def test_blocks_are_digested_one_by_one_and_fit_64_bits() -> None:
    blocks = torch.randint(0, 256, (5, 4096), dtype=torch.uint8)
    together = block_digest(blocks)
    assert together == [digest(block) for block in blocks]
    assert all(0 <= value < 2**64 for value in together)
