"""Where an admitted request's KV comes from: pulls, forks, and what must be computed again.

Owns the blocks of a request until each is handed to a sequence. Never starts or ends a sequence.
"""

from __future__ import annotations

from collections.abc import Callable

from kv.block import block_keys, prefix_identity
from protos import common_pb2, decode_pb2
from services.worker import Worker

Start = Callable[[common_pb2.SequenceState, list[int], int], None]
"""Takes a sequence's state, its blocks and how many of its tokens have KV in them."""


class Admission:
    """Places the sequences of one request on a worker."""

    def __init__(self, worker: Worker, admit: decode_pb2.Admit, root: bytes, start: Start) -> None:
        self._worker = worker
        self._admit = admit
        self._root = root
        self._start = start

    async def place(self) -> int:
        """Pulls KV and queues every sequence; returns tokens pulled for the first one.

        Sequences that still agree on all tokens but the last share one pull: full blocks by
        reference, the tail block by copy. After a resume each pulls its own.
        """
        states = self._admit.sequences
        if not states:
            raise ValueError("sequences is empty; at least one is needed")
        prompt = list(self._admit.prompt_token_ids)
        tokens = [*prompt, *states[0].output_token_ids]
        blocks, num_computed = await self._pull(tokens)
        # Pinned until the last fork is made: the first sequence may finish meanwhile.
        self._worker.pool.share(blocks)
        diverged = []
        try:
            self._start(states[0], blocks, num_computed)
            for state in states[1:]:
                own = [*prompt, *state.output_token_ids]
                if own[:-1] == tokens[:-1]:
                    self._start(state, *await self._worker.engine.fork(blocks, num_computed))
                else:
                    diverged.append((state, own))
        finally:
            self._worker.release(blocks)
        for state, own in diverged:
            self._start(state, *await self._pull(own))
        return num_computed

    async def _pull(self, tokens: list[int]) -> tuple[list[int], int]:
        """Gets KV for all tokens but the last: sealed blocks and the private tail."""
        worker, admit = self._worker, self._admit
        block_tokens = worker.block_tokens
        num_needed = len(tokens) - 1
        keys = block_keys(self._root, tokens[:num_needed], block_tokens)
        blocks = await worker.engine.allocate(-(-num_needed // block_tokens), admit.priority)
        try:
            tail_key = admit.handoff.tail_key if self._has_tail(num_needed) else b""
            num_pulled, has_tail = await worker.pull(
                keys, blocks, tail_key, waits_for_writers=admit.HasField("handoff")
            )
            if has_tail and num_pulled == len(keys):
                return blocks, num_needed
            return blocks, num_pulled * block_tokens
        except BaseException:
            worker.release(blocks)
            raise

    def _has_tail(self, num_needed: int) -> bool:
        """Whether the hand-off's tail is exactly what these tokens need."""
        admit = self._admit
        handoff = admit.handoff
        if not handoff.tail_key or handoff.num_tokens != num_needed:
            return False
        prompt = admit.prompt_token_ids[: handoff.num_tokens]
        identity = prefix_identity(self._root, prompt, self._worker.block_tokens)
        if identity != handoff.identity:
            failures = self._worker.telemetry.instruments.kv_verify_failures
            failures.add(1, {"reason": "identity"})
            return False
        return True
