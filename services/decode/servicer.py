"""DecodeService: sessions over one engine.

Owns the set of sessions and hands each step's outcome to them and to the meter.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from engine.sequence import Sequence as EngineSequence
from engine.sequence import StepOutcome
from mesh.tracing import Span
from protos import decode_pb2, decode_pb2_grpc, status_pb2
from services.decode.session import Session
from services.decode.step_meter import StepMeter
from services.decode.trace import StepSpans
from services.worker import Worker

if TYPE_CHECKING:
    import grpc


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Serves gateways' sessions over one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._sessions: dict[int, Session] = {}
        self._ids = itertools.count(1)
        self._meter = StepMeter(worker.engine, worker.telemetry)
        self._step_spans = StepSpans(
            worker.telemetry.tracing, worker.settings.trace_step_interval, self._span_of
        )
        worker.listeners.append(self._on_step)
        worker.reporters.append(self._report)
        worker.failure_listeners.append(self._on_failure)

    @property
    def num_requests(self) -> int:
        """Requests in flight over all sessions."""
        return sum(session.num_requests for session in self._sessions.values())

    def check(self) -> None:
        """Asserts that every session keeps live sequences only."""
        for session in self._sessions.values():
            session.check()

    def end_sessions(self) -> None:
        """Ends every session's stream, at the end of a drain."""
        for session in self._sessions.values():
            session.end()

    async def Session(  # noqa: N802 - gRPC method name
        self,
        request_iterator: AsyncIterator[decode_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[decode_pb2.SessionRequest, decode_pb2.SessionResponse],
    ) -> AsyncIterator[decode_pb2.SessionResponse]:
        """One gateway's stream; when it ends, its requests are dropped and their blocks freed."""
        session_id = next(self._ids)
        session = self._sessions[session_id] = Session(self._worker, session_id)
        reader = asyncio.ensure_future(_read(session, request_iterator))
        try:
            while (message := await session.next_message()) is not None:
                yield message
        finally:
            reader.cancel()
            session.close()
            del self._sessions[session_id]

    def _on_step(self, outcome: StepOutcome) -> None:
        self._step_spans.record(outcome)  # first: what ends with this step is still known
        for item in outcome.items:
            self._sessions[item.sequence.key.session_id].on_item(item)
        for session in self._sessions.values():
            session.flush()
        self._worker.count_tokens(self._meter.record(outcome))

    def _span_of(self, sequence: EngineSequence) -> Span:
        return self._sessions[sequence.key.session_id].span_of(sequence.key.handle)

    def _report(self, status: status_pb2.InstanceStatus) -> None:
        status.decode_steps.CopyFrom(self._meter.snapshot())

    def _on_failure(self, sequences: Sequence[EngineSequence], error: BaseException) -> None:
        for sequence in sequences:
            if session := self._sessions.get(sequence.key.session_id):
                session.fail(sequence, error)


async def _read(session: Session, requests: AsyncIterator[decode_pb2.SessionRequest]) -> None:
    """Feeds the gateway's commands to the session until the gateway is gone."""
    try:
        async for command in requests:
            session.command(command)
    finally:
        session.end()
