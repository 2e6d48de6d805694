"""KV writes go to their slots and nowhere else."""

from __future__ import annotations

import torch

from kernels import ops


def test_every_slot_gets_its_token_and_no_other_changes() -> None:
    before = torch.randn(6, 2, 3, 2, 4, 8)  # as in the block layout
    cache = before.clone()
    key, value = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    block_ids, offsets = torch.tensor([4, 4, 0, 5]), torch.tensor([2, 3, 0, 1])
    ops.kv_write(cache, 1, key, value, block_ids, offsets)
    for token, (block, offset) in enumerate(zip(block_ids, offsets, strict=True)):
        assert torch.equal(cache[block, :, 1, 0, offset], key[token])
        assert torch.equal(cache[block, :, 1, 1, offset], value[token])
        before[block, :, 1, 0, offset] = key[token]
        before[block, :, 1, 1, offset] = value[token]
    assert torch.equal(cache, before)
