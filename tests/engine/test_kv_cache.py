"""The paged KV arena: layout, alignment, copies, clearing, digests."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch

from engine.kv_cache import KvCache
from kv.layout import BlockLayout

LAYOUT = BlockLayout(num_kv_heads=2, num_layers=3, block_tokens=4, head_dim=8, dtype_num_bytes=2)


@pytest.fixture
def cache() -> KvCache:
    cache = KvCache(LAYOUT, 5, "cpu", torch.bfloat16)
    cache.blocks.copy_(torch.randn(cache.blocks.shape))
    return cache


def test_storage_is_one_page_aligned_run_of_blocks() -> None:
    cache = KvCache(LAYOUT, 5, "cpu", torch.bfloat16)
    assert cache.address % mmap.PAGESIZE == 0
    assert cache.num_bytes == 5 * LAYOUT.num_bytes == cache.storage.numel()
    assert cache.blocks.shape == (5, *LAYOUT.shape) and cache.blocks.is_contiguous()
    assert not cache.storage.any()
    assert cache.blocks[3].data_ptr() - cache.address == 3 * LAYOUT.num_bytes


def test_copied_blocks_have_equal_digests(cache: KvCache) -> None:
    before = cache.digest([0, 1, 2, 3, 4])
    assert len(set(before)) == 5
    cache.copy_blocks([0, 2], [3, 1])
    assert cache.digest([3, 1, 0, 2, 4]) == [before[i] for i in (0, 2, 0, 2, 4)]
    with pytest.raises(ValueError, match="1 blocks for 2 targets"):
        cache.copy_blocks([0], [1, 2])


def test_clearing_touches_only_what_is_named(cache: KvCache) -> None:
    before = cache.blocks.clone()
    cache.zero_block_tail(2, 3)
    cache.zero_blocks([4])
    assert torch.equal(cache.blocks[2, :, :, :, :3], before[2, :, :, :, :3])
    assert not cache.blocks[2, :, :, :, 3:].any() and not cache.blocks[4].any()
    assert torch.equal(cache.blocks[[0, 1, 3]], before[[0, 1, 3]])


def test_fp8_blocks_carry_their_scales() -> None:
    layout = replace(LAYOUT, dtype_num_bytes=1, scale_num_bytes=4)
    assert layout.num_bytes == 2 * 3 * 2 * 4 * (8 + 4)
    cache = KvCache(layout, 3, "cpu", torch.float8_e4m3fn)
    assert cache.blocks.shape == (3, *layout.shape)
    scales = cache.pages.scales
    assert scales is not None and scales.shape == (3, *layout.shape[:-1])
    cache.storage.fill_(1)
    cache.zero_block_tail(1, 3)
    assert cache.storage.view(3, -1)[[0, 2]].eq(1).all()
    assert not cache.blocks[1, :, :, :, 3:].view(torch.uint8).any()
    assert not scales[1, :, :, :, 3:].any() and scales[1, :, :, :, :3].all()
    cache.copy_blocks([1], [0])
    assert torch.equal(scales[0], scales[1])


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks: 0"):
        KvCache(LAYOUT, 0, "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="2 bytes"):
        KvCache(LAYOUT, 1, "cpu", torch.float32)
    with pytest.raises(ValueError, match="0 bytes a scale"):
        KvCache(replace(LAYOUT, dtype_num_bytes=1), 1, "cpu", torch.float8_e4m3fn)
