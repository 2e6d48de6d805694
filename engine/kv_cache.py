"""The worker's paged KV memory: one page-aligned arena in the block layout, registered with NIXL
by others.
"""

from __future__ import annotations

import mmap

import torch

from kernels import ops
from kv.layout import BlockLayout


class KvCache:
    """`num_blocks` blocks of `layout`; `blocks` is [num_blocks, *layout.shape]."""

    def __init__(
        self, layout: BlockLayout, num_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.dtype = dtype
        self.num_bytes = num_blocks * layout.num_bytes
        if device.type == "cpu":
            self._memory = mmap.mmap(-1, self.num_bytes)
            self.storage = torch.frombuffer(self._memory, dtype=torch.uint8)
        else:
            self.storage = torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        self.blocks = self.storage.view(dtype).view(num_blocks, *layout.shape)
        self._rows = self.storage.view(num_blocks, layout.num_bytes)

    @property
    def address(self) -> int:
        """Virtual address of the arena."""
        return self.storage.data_ptr()

    def digest(self, block_ids: list[int]) -> list[int]:
        """64-bit digest of each block's bytes."""
        return [ops.block_digest(self._rows[block : block + 1])[0] for block in block_ids]

    def copy_blocks(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole blocks, sources[i] to targets[i]."""
        self._rows[targets] = self._rows[sources]

    def zero_block_tail(self, block: int, num_tokens: int) -> None:
        """Clears the slots after the first num_tokens: no stale KV leaves with a partly filled
        block.
        """
        self.blocks[block, :, :, :, num_tokens:] = 0
