"""The worker's paged KV memory: one page-aligned arena in the block layout.

Owns the bytes. Never knows whose blocks they are, and never registers the arena with NIXL. On a GPU
digests and tails have a stream of their own: they concern blocks that no step touches any more, and
wait for none.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

from kernels import ops
from kernels.kv_pages import FP8, SCALE_NUM_BYTES, KvPages
from kv.layout import BlockLayout


class KvCache:
    """`num_blocks` blocks of `layout`, all zeros at first.

    storage: [num_bytes] uint8; pages: what the kernels read and write, a view of it; blocks: the
    pages' values [num_blocks, *layout.shape] of dtype. FP8 pages carry a scale per vector.
    """

    def __init__(
        self,
        layout: BlockLayout,
        num_blocks: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks}; at least 1")
        if dtype.itemsize != layout.dtype_num_bytes:
            raise ValueError(f"dtype: {dtype}; layout has {layout.dtype_num_bytes} bytes a value")
        if self.scale_num_bytes(dtype) != layout.scale_num_bytes:
            raise ValueError(f"dtype: {dtype}; layout has {layout.scale_num_bytes} bytes a scale")
        self.layout = layout
        self.num_blocks = num_blocks
        self.dtype = dtype
        self.num_bytes = num_blocks * layout.num_bytes
        if torch.device(device).type == "cpu":
            # Anonymous pages are aligned and zero, and cost nothing until they are used.
            self.storage = torch.frombuffer(mmap.mmap(-1, self.num_bytes), dtype=torch.uint8)
        else:
            self.storage = torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        self.pages = KvPages.of(self.storage, layout.shape, dtype)
        self.blocks = self.pages.values
        self._rows = self.storage.view(num_blocks, layout.num_bytes)
        self._beside = torch.cuda.Stream(self.storage.device) if self.storage.is_cuda else None

    @property
    def device_id(self) -> int | None:
        """Index of the GPU that the arena is on; None on a CPU."""
        return self.storage.device.index if self.storage.is_cuda else None

    @property
    def address(self) -> int:
        """Virtual address of the arena."""
        return self.storage.data_ptr()

    def make_current(self) -> None:
        """Lets the calling thread use the arena's GPU; does nothing on a CPU."""
        if self.storage.is_cuda:
            torch.cuda.set_device(self.storage.device)

    def digest(self, block_ids: list[int]) -> list[int]:
        """64-bit digest of each block's bytes, unsigned; see kernels/block_digest.py. Waits."""
        with self._beside_steps():
            return ops.block_digest(self._rows, block_ids)

    def copy_blocks(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole blocks, sources[i] to targets[i]; lists of equal length."""
        if len(sources) != len(targets):
            raise ValueError(f"sources: {len(sources)} blocks for {len(targets)} targets")
        for source, target in zip(sources, targets, strict=True):
            self._rows[target].copy_(self._rows[source])

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Clears blocks that a sequence begins to fill, whatever a former owner left in them."""
        for block in block_ids:
            self._rows[block].zero_()

    def zero_block_tail(self, block: int, num_tokens: int) -> None:
        """Clears the slots after the first num_tokens: a partial block leaves without old KV.
        Waits: whoever sends the block away knows nothing of streams.
        """
        with self._beside_steps():
            self.blocks[block, :, :, :, num_tokens:].zero_()
            if self.pages.scales is not None:
                self.pages.scales[block, :, :, :, num_tokens:].zero_()
        if self._beside is not None:
            self._beside.synchronize()

    def _beside_steps(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._beside is None else torch.cuda.stream(self._beside)

    @staticmethod
    def scale_num_bytes(dtype: torch.dtype) -> int:
        """Bytes of the scale that stands with every vector of this dtype: 0 or 4."""
        return SCALE_NUM_BYTES if dtype == FP8 else 0
