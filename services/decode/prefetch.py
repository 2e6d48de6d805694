"""A prompt's KV pulled before its request is admitted, while prefill computes the last chunk.

Owns the blocks until an admission takes them, and the count of what came of it. Never waits for
memory and never answers: whoever finds less than the whole prompt here pulls anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from mesh import spans
from protos import decode_pb2
from services.decode.pulling import pull
from services.worker import Worker

log = logging.getLogger("kvmesh.decode")

PREFETCH_S = 3.0
"""So long blocks are kept for a request that is not admitted."""


class Prefetch:
    """One pull under way or over. Ended by `take` or `close`; on_expired is called after 3 s
    without either.
    """

    def __init__(
        self,
        worker: Worker,
        command: decode_pb2.Prefetch,
        blocks: list[int],
        on_expired: Callable[[], None],
    ) -> None:
        self._worker = worker
        self._command = command
        self._blocks = blocks
        self._is_over = False
        self._pulling = asyncio.ensure_future(self._pull())
        self._pulling.add_done_callback(self._on_pulled)
        self._expiry = asyncio.get_running_loop().call_later(PREFETCH_S, on_expired)

    def is_for(self, admit: decode_pb2.Admit) -> bool:
        """Whether it pulls all that this request needs: the prompt, before its second token."""
        command = self._command
        return (
            admit.HasField("handoff")
            and len(admit.sequences[0].output_token_ids) == 1
            and admit.handoff == command.handoff
            and admit.cache_salt == command.cache_salt
            and admit.prompt_token_ids == command.prompt_token_ids
        )

    def keep(self) -> None:
        """Its request is admitted: from now on that one's end is this one's."""
        self._expiry.cancel()

    async def take(self) -> list[int]:
        """Waits for the pull; the prompt's blocks, the caller's to free, or none: not all came."""
        if not await self._pulling:
            return []
        blocks, self._blocks = self._blocks, []
        self._end("used")
        return blocks

    def close(self) -> None:
        """Frees what was not taken; what a late READ may still write stays in quarantine."""
        self._expiry.cancel()
        self._end("wasted")
        if not self._pulling.cancel():  # else they are free when it has ended
            self._release()

    def check(self) -> None:
        """Asserts that it holds references to its blocks."""
        for block in self._blocks:
            assert self._worker.pool.num_refs(block) > 0, f"prefetched block {block} is free"

    def _end(self, result: str) -> None:
        """Counts it, the first time."""
        if not self._is_over:
            self._is_over = True
            self._worker.telemetry.instruments.kv_prefetches.add(1, {"result": result})

    async def _pull(self) -> bool:
        """Whether the whole prompt's KV is here now."""
        worker, command = self._worker, self._command
        token_ids, telemetry = list(command.prompt_token_ids), worker.telemetry
        with telemetry.tracing.span(
            spans.PREFETCH,
            parent=telemetry.context(command.traceparent),
            attributes={spans.REQUEST_ID: command.request_id},
        ) as span:
            root = worker.root(command.cache_salt)
            try:
                num_pulled = await pull(worker, root, token_ids, self._blocks, command.handoff)
            except Exception:  # the edge of this task: the admission pulls anew
                log.exception("prefetch of %s failed", command.request_id)
                span.fail("INTERNAL")
                return False
        return num_pulled == len(token_ids)

    def _on_pulled(self, pulling: asyncio.Task[bool]) -> None:
        """Also when the task was cancelled before its first line."""
        if pulling.cancelled() or not pulling.result():
            self._release()

    def _release(self) -> None:
        blocks, self._blocks = self._blocks, []
        self._worker.release(blocks)
