"""A request's stay on one decode rank.

Owns the handle there: outputs come in, stops and cancels go out, and nothing stays behind on the
rank. Never chooses the rank.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as List

from mesh.errors import KvmeshError
from protos import common_pb2, decode_pb2
from services.gateway.ledger import Ledger
from services.gateway.outbox import Outbox
from services.gateway.sequence import Sequence
from services.gateway.session import RankSession


class Placement:
    """The mailbox of one admission; `close` cancels what the rank has not finished."""

    def __init__(
        self, session: RankSession, sequences: List[Sequence], outbox: Outbox, ledger: Ledger
    ) -> None:
        self._session = session
        self._sequences = {sequence.index: sequence for sequence in sequences}
        self._at_rank = set(self._sequences)
        self._outbox = outbox
        self._ledger = ledger
        self._handle = 0
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_pulled_tokens: int | None = None

    async def run(self, admit: decode_pb2.Admit, prefetched: int | None) -> None:
        """Admits, under the handle of a prefetch if there is one, and waits until every sequence
        has ended; raises what the rank failed with.
        """
        num_tokens = len(admit.prompt_token_ids) + len(admit.sequences)
        with self._session.instance.load(num_tokens):
            self._handle = self._session.admit(admit, self, prefetched)
            await self._over

    def close(self) -> None:
        """Ends whatever still runs at the rank."""
        if self._at_rank:
            self._session.cancel(self._handle)
        else:
            self._session.forget(self._handle)
        if self._over.done() and not self._over.cancelled():
            self._over.exception()  # seen, also when the request ended for another reason
        self._over.cancel()

    def on_admitted(self, admitted: decode_pb2.Admitted) -> None:
        """The KV is in place."""
        self.num_pulled_tokens = admitted.num_pulled_tokens
        self._ledger.on_admitted(admitted.get_s)

    def on_output(self, output: decode_pb2.SequenceOutput) -> None:
        """New tokens: into the sequence, and back to the rank if a stop string ended it."""
        index = output.sequence_index
        sequence = self._sequences[index]
        if sequence.finished is not None:
            self._left(index, output.finish_reason)
            return
        self._ledger.on_token()
        sequence.push(output.token_ids, output.logprobs, output.finish_reason)
        self._outbox.wake()
        if sequence.finished is not None:
            self._left(index, output.finish_reason)
            if all(s.finished is not None for s in self._sequences.values()):
                self._end()
            elif index in self._at_rank:
                self._session.cancel(self._handle, index)

    def on_failure(self, error: KvmeshError) -> None:
        """The rank refused or is gone."""
        self._at_rank.clear()
        if not self._over.done():
            self._over.set_exception(error)

    def _left(self, index: int, reason: common_pb2.FinishReason) -> None:
        if reason != common_pb2.FINISH_REASON_UNSPECIFIED:
            self._at_rank.discard(index)

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)
