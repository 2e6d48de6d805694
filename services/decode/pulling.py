"""How KV gets from the store into a rank's blocks: a sealed prefix, and a hand-off's tail.

Owns the check that a tail stands for exactly the tokens at hand. Never allocates or frees a block.
"""

from __future__ import annotations

from kv.block import block_keys, prefix_identity
from protos import common_pb2
from services.worker import Worker


async def pull(
    worker: Worker,
    root: bytes,
    token_ids: list[int],
    blocks: list[int],
    handoff: common_pb2.Handoff | None,
) -> int:
    """Pulls KV of token_ids into blocks that hold them all; returns how many have it, verified.

    With a hand-off, what is still being written is waited for. `blocks` may end earlier afterwards,
    see `Worker.pull`.
    """
    keys = block_keys(root, token_ids, worker.block_tokens)
    tail_key = b""
    if handoff is not None and handoff.tail_key and _is_for(worker, handoff, root, token_ids):
        tail_key = handoff.tail_key
    pulled, has_tail = await worker.pull(
        keys, blocks, tail_key, waits_for_writers=handoff is not None
    )
    if has_tail and pulled.num_blocks == len(keys):
        return len(token_ids)
    return pulled.num_blocks * worker.block_tokens


def _is_for(worker: Worker, handoff: common_pb2.Handoff, root: bytes, token_ids: list[int]) -> bool:
    """Whether the hand-off's tail is exactly what these tokens need."""
    if handoff.num_tokens != len(token_ids):
        return False
    if prefix_identity(root, token_ids, worker.block_tokens) == handoff.identity:
        return True
    worker.telemetry.instruments.kv_verify_failures.add(1, {"reason": "identity"})
    return False
