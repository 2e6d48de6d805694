"""Where an admitted request's KV comes from: pulls, forks, and what must be computed again.

Owns the blocks of a request until each is handed to a sequence. Never starts or ends a sequence.
"""

from __future__ import annotations

from collections.abc import Callable

from protos import common_pb2, decode_pb2
from services.decode.prefetch import Prefetch
from services.decode.pulling import pull
from services.worker import Worker

Start = Callable[[common_pb2.SequenceState, list[int], int], None]
"""Takes a sequence's state, its blocks and how many of its tokens have KV in them."""


class Admission:
    """Places the sequences of one request on a worker."""

    def __init__(
        self,
        worker: Worker,
        admit: decode_pb2.Admit,
        prompt_token_ids: list[int],
        root: bytes,
        prefetch: Prefetch | None,
        start: Start,
    ) -> None:
        self._worker = worker
        self._admit = admit
        self._prompt = prompt_token_ids
        self._root = root
        self._prefetch = prefetch
        self._start = start

    async def place(self) -> int:
        """Pulls KV and queues every sequence; returns tokens pulled for the first one.

        Sequences that still agree on all tokens but the last share one pull: full blocks by
        reference, the tail block by copy. After a resume each pulls its own.
        """
        states = self._admit.sequences
        if not states:
            raise ValueError("sequences is empty; at least one is needed")
        prompt = self._prompt
        tokens = [*prompt, *states[0].output_token_ids]
        blocks, num_computed = await self._find(tokens)
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

    async def _find(self, tokens: list[int]) -> tuple[list[int], int]:
        """The KV of all tokens but the last: prefetched if all of it was, else pulled now."""
        prefetch = self._prefetch
        if prefetch is None:
            return await self._pull(tokens)
        if prefetch.is_for(self._admit) and (blocks := await prefetch.take()):
            return blocks, len(tokens) - 1
        prefetch.close()
        return await self._pull(tokens)

    async def _pull(self, tokens: list[int]) -> tuple[list[int], int]:
        """Gets KV for all tokens but the last: sealed blocks and the private tail."""
        worker, admit = self._worker, self._admit
        needed = tokens[:-1]
        num_blocks = worker.pool.num_blocks_for(len(needed))
        blocks = await worker.engine.allocate(num_blocks, admit.priority)
        handoff = admit.handoff if admit.HasField("handoff") else None
        try:
            return blocks, await pull(worker, self._root, needed, blocks, handoff)
        except BaseException:
            worker.release(blocks)
            raise
