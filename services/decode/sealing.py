"""Blocks a rank fills while decoding, sealed into the store as they fill.

Owns the chain of block names of one sequence and the puts in flight. A block is pinned while it is
being written out; losing a put only costs a later recomputation.
"""

from __future__ import annotations

import contextvars

from engine.sequence import Sequence, StepItem
from kv.block import block_keys
from services.worker import PUBLISH_DEADLINE_S, Worker


class SealedBlocks:
    """Follows one sequence's full blocks into the store, in order."""

    def __init__(self, *, worker: Worker, root: bytes, tenant: str, sequence: Sequence) -> None:
        self._worker = worker
        self._tenant = tenant
        self._sequence = sequence
        self._context = contextvars.copy_context()  # of the admission: whose trace this belongs to
        self._num_sealed = sequence.num_computed // worker.block_tokens
        # The name before the next block's, in the chain from `root`; not known before it is needed.
        self._root, self._parent = root, b""

    def advance(self, item: StepItem) -> None:
        """Seals what this step filled; called on the loop after the step."""
        block_tokens = self._worker.block_tokens
        num_full = item.num_computed_after // block_tokens
        if num_full <= self._num_sealed:
            return
        first, self._num_sealed = self._num_sealed, num_full
        known = first if self._parent else 0
        tokens = self._sequence.token_ids[known * block_tokens : num_full * block_tokens]
        keys = block_keys(self._parent or self._root, tokens, block_tokens)[first - known :]
        self._parent = keys[-1]
        blocks = self._sequence.blocks[first:num_full]
        self._worker.pool.share(blocks)
        self._worker.spawn(self._put(keys, blocks), self._context)

    async def _put(self, keys: list[bytes], blocks: list[int]) -> None:
        try:
            await self._worker.store.put(
                keys, blocks, tenant=self._tenant, deadline_s=PUBLISH_DEADLINE_S
            )
        finally:
            self._worker.release(blocks)
