"""Digest of KV blocks: what it must notice, and that it is the documented function."""

from __future__ import annotations

import pytest
import torch

from kernels import ops

MASK = 2**64 - 1


def reference(data: bytes) -> int:
    """The definition, word by word, in Python integers."""
    total = 0
    for index in range(len(data) // 8):
        word = int.from_bytes(data[8 * index : 8 * index + 8], "little")
        x = (word + (index + 1) * 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ (x >> 32)) * 0xBF58476D1CE4E5B9) & MASK
        total += x ^ (x >> 29)
    return total & MASK


def random_blocks(num_blocks: int, num_bytes: int) -> torch.Tensor:
    """[num_blocks, num_bytes] uint8."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (num_blocks, num_bytes), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("num_bytes", [8, 64, 4096, 16_384 * 8, 16_384 * 8 + 24])
def test_digest_is_the_documented_function(num_bytes: int) -> None:
    blocks = random_blocks(3, num_bytes)
    assert ops.block_digest(blocks) == [reference(bytes(block.tolist())) for block in blocks]


def test_digests_do_not_depend_on_company() -> None:
    blocks = random_blocks(40, 4096)
    assert ops.block_digest(blocks) == [ops.block_digest(block[None])[0] for block in blocks]
    assert all(0 <= digest < 2**64 for digest in ops.block_digest(blocks))


def test_every_flipped_bit_is_noticed() -> None:
    block = random_blocks(1, 512)
    variants = block.repeat(512 * 8, 1)
    for bit in range(512 * 8):
        variants[bit, bit // 8] ^= 1 << bit % 8
    digests = ops.block_digest(variants)
    assert len({*digests, ops.block_digest(block)[0]}) == 512 * 8 + 1


def test_swapped_words_are_noticed() -> None:
    block = random_blocks(1, 512)
    words = block.view(torch.int64)[0]
    digests = ops.block_digest(block)
    for first in range(64):
        for second in range(first):
            swapped = words.clone()
            swapped[first], swapped[second] = words[second], words[first]
            digests += ops.block_digest(swapped.view(torch.uint8)[None])
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("fill", [0, 255])
def test_lost_tails_and_zeroed_ranges_are_noticed(fill: int) -> None:
    block = torch.full((1, 4096), fill, dtype=torch.uint8)
    digests = [ops.block_digest(block[:, :end])[0] for end in range(8, 4097, 8)]
    assert len(set(digests)) == len(digests)
    noise = random_blocks(1, 4096)
    zeroed = [ops.block_digest(noise)[0]]
    for start in range(0, 4096, 256):
        damaged = noise.clone()
        damaged[:, start : start + 256] = 0
        zeroed += ops.block_digest(damaged)
    assert len(set(zeroed)) == len(zeroed)


def test_ragged_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        ops.block_digest(torch.zeros(1, 12, dtype=torch.uint8))
