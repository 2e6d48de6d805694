"""One gateway's session on this rank: its requests, and one outgoing message per step.

Owns the requests' admission (memory, pull, fork), their outputs until sent, and their end. Never
samples, never decides what a step runs.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from dataclasses import dataclass, field

import grpc

from engine.sequence import Sequence, SequenceState, StepItem
from kv.block import tenant_id
from mesh import spans
from mesh.errors import KvmeshError
from mesh.tracing import Span
from protos import common_pb2, decode_pb2
from services import wire
from services.decode.admission import Admission
from services.decode.prefetch import Prefetch
from services.decode.sealing import SealedBlocks
from services.decode.trace import begin_decode
from services.worker import Worker

log = logging.getLogger("kvmesh.decode")

LIVE = (SequenceState.WAITING, SequenceState.RUNNING)


@dataclass(slots=True)
class Request:
    """One admitted request and what it holds."""

    admit: decode_pb2.Admit
    prompt_token_ids: list[int]
    root: bytes
    prefetch: Prefetch | None
    span: Span
    admission: asyncio.Task[None] | None = None
    sequences: dict[int, Sequence] = field(default_factory=dict)
    sealed: dict[int, SealedBlocks] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceKey:
    """Names a sequence on this rank."""

    session_id: int
    handle: int
    sequence_index: int


class Session:
    """State of one bidirectional stream. All methods run on the event loop."""

    def __init__(self, worker: Worker, session_id: int) -> None:
        self._worker = worker
        self._session_id = session_id
        self._requests: dict[int, Request] = {}
        self._prefetches: dict[int, Prefetch] = {}  # of requests that are not admitted yet
        self._pending = decode_pb2.SessionResponse()
        self._outputs: dict[SequenceKey, decode_pb2.SequenceOutput] = {}
        self._has_pending = asyncio.Event()
        self._closed = False

    @property
    def num_requests(self) -> int:
        """Live requests on this session, prefetched ones included."""
        return len(self._requests) + len(self._prefetches)

    async def next_message(self) -> decode_pb2.SessionResponse | None:
        """Waits for something to say; a slow stream gets several steps in one message. None at the
        end.
        """
        await self._has_pending.wait()
        self._has_pending.clear()
        if self._closed:
            return None
        message, self._pending = self._pending, decode_pb2.SessionResponse()
        self._outputs.clear()
        message.step = self._worker.engine.num_steps
        return message

    def end(self) -> None:
        """The gateway half-closed or is gone: wakes the writer for the last time."""
        self._closed = True
        self._has_pending.set()

    def command(self, command: decode_pb2.SessionRequest) -> None:
        """Takes one command of the gateway."""
        if command.HasField("admit"):
            self._admit(command.admit)
        elif command.HasField("cancel"):
            cancel = command.cancel
            index = cancel.sequence_index if cancel.HasField("sequence_index") else None
            self._cancel(cancel.handle, index)
        elif command.HasField("prefetch"):
            self._prefetch(command.prefetch)

    def close(self) -> None:
        """Drops every request; blocks are free at once or after the step that runs over them."""
        for handle in [*self._requests, *self._prefetches]:
            self._cancel(handle, None)

    def check(self) -> None:
        """Asserts that a request is being admitted or has sequences, each live in the engine."""
        for handle, prefetch in self._prefetches.items():
            assert handle not in self._requests, f"handle {handle} is admitted and is to be"
            prefetch.check()
        for handle, request in self._requests.items():
            assert request.sequences.keys() == request.sealed.keys(), f"handle {handle}: sealing"
            is_admitted = request.admission is None or request.admission.done()
            assert request.sequences or not is_admitted, f"handle {handle} holds nothing"
            for sequence in request.sequences.values():
                assert sequence.state in LIVE, f"handle {handle}: {sequence.state.value} sequence"

    def span_of(self, handle: int) -> Span:
        """The span of a live request."""
        return self._requests[handle].span

    def on_item(self, item: StepItem) -> None:
        """Takes one sequence's part of a step."""
        key = item.sequence.key
        request = self._requests[key.handle]
        request.sealed[key.sequence_index].advance(item)
        if item.token_ids:
            self._append_output(key, item)
        if item.finish_reason is not None:
            self._forget(key.handle, key.sequence_index)

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """The step that held this sequence failed: the whole request is rejected."""
        handle = sequence.key.handle
        if handle in self._requests:
            self._refuse(handle, grpc.StatusCode.INTERNAL, f"decode step failed: {error}")

    def flush(self) -> None:
        """Ends a step: whatever is pending goes out in one message."""
        if self._pending.ByteSize():
            self._has_pending.set()

    def _admit(self, admit: decode_pb2.Admit) -> None:
        if admit.handle in self._requests:
            self._reject(
                admit.handle, grpc.StatusCode.ALREADY_EXISTS, f"handle {admit.handle} is live"
            )
            return
        if prefetch := self._prefetches.pop(admit.handle, None):
            prefetch.keep()
        root = self._worker.root(admit.cache_salt)
        prompt = list(admit.prompt_token_ids)
        span = begin_decode(self._worker.telemetry, admit)
        request = Request(
            admit=admit, prompt_token_ids=prompt, root=root, prefetch=prefetch, span=span
        )
        self._requests[admit.handle] = request
        request.admission = asyncio.ensure_future(self._run_admission(request))

    def _prefetch(self, command: decode_pb2.Prefetch) -> None:
        """Begins to pull if there is memory now; says nothing, whatever becomes of it."""
        worker, handle = self._worker, command.handle
        if handle in self._requests or handle in self._prefetches:
            return
        num_tokens = len(command.prompt_token_ids)
        try:
            worker.check_request(command.fingerprint, num_tokens)
        except KvmeshError as error:
            log.debug("no prefetch of %s: %s", command.request_id, error)
            return
        num_blocks = worker.pool.num_blocks_for(num_tokens)
        blocks = worker.engine.allocate_now(num_blocks, command.priority)
        if blocks is None:
            worker.telemetry.instruments.kv_prefetches.add(1, {"result": "refused"})
        else:
            expire = functools.partial(self._cancel, handle, None)
            self._prefetches[handle] = Prefetch(worker, command, blocks, expire)

    async def _run_admission(self, request: Request) -> None:
        admit = request.admit
        with request.span.current():
            try:
                self._worker.check_request(admit.fingerprint, len(admit.prompt_token_ids))
                started_at = time.monotonic()
                admission = Admission(
                    self._worker,
                    admit,
                    request.prompt_token_ids,
                    request.root,
                    request.prefetch,
                    functools.partial(self._start_sequence, request),
                )
                num_pulled = await admission.place()
                request.span.set({spans.PULLED_TOKENS: num_pulled})
                self._pending.admitted.add(
                    handle=admit.handle,
                    num_pulled_tokens=num_pulled,
                    get_s=time.monotonic() - started_at,
                )
                self._has_pending.set()
                if not request.sequences:  # all ended or were cancelled while the last was placed
                    self._end(admit.handle)
            except KvmeshError as error:
                self._refuse(admit.handle, error.code, str(error))
            except ValueError as error:
                self._refuse(admit.handle, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except Exception as error:  # the edge of this task: the gateway must hear of it
                log.exception("admission of %s failed", admit.request_id)
                self._refuse(admit.handle, grpc.StatusCode.INTERNAL, f"admission failed: {error!r}")

    def _start_sequence(
        self,
        request: Request,
        state: common_pb2.SequenceState,
        blocks: list[int],
        num_computed: int,
    ) -> None:
        admit, index = request.admit, state.sequence_index
        if index in request.cancelled:
            self._worker.release(blocks)
            return
        sequence = Sequence(
            key=SequenceKey(session_id=self._session_id, handle=admit.handle, sequence_index=index),
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=list(state.output_token_ids),
            seeds=(state.seed,),
            sampling=wire.sampling_params(admit.sampling),
            stopping=wire.stopping_params(admit.stopping, admit.eos_token_ids),
            num_logprobs=admit.logprobs if admit.HasField("logprobs") else None,
            priority=admit.priority,
        )
        sequence.blocks = list(blocks)
        sequence.num_computed = num_computed
        request.sequences[index] = sequence
        request.sealed[index] = SealedBlocks(
            worker=self._worker,
            root=request.root,
            tenant=tenant_id(request.admit.cache_salt),
            sequence=sequence,
        )
        self._worker.engine.add(sequence)

    def _append_output(self, key: SequenceKey, item: StepItem) -> None:
        output = self._outputs.get(key)
        if output is None:
            output = self._pending.outputs.add(handle=key.handle, sequence_index=key.sequence_index)
            self._outputs[key] = output
        output.token_ids.extend(item.token_ids)
        output.logprobs.extend(wire.position_logprobs(p) for p in item.logprobs)
        output.finish_reason = wire.finish_reason(item.finish_reason)

    def _cancel(self, handle: int, sequence_index: int | None) -> None:
        if prefetch := self._prefetches.pop(handle, None):
            prefetch.close()
        request = self._requests.get(handle)
        if request is None:
            return
        if sequence_index is not None and len(request.admit.sequences) > 1:
            request.cancelled.add(sequence_index)
            if sequence := request.sequences.get(sequence_index):
                self._worker.engine.drop(sequence)
                self._forget(handle, sequence_index)
            return
        self._end(handle)
        current = asyncio.current_task()
        if request.admission and request.admission is not current:
            request.admission.cancel()
        if request.prefetch is not None:
            request.prefetch.close()
        for sequence in request.sequences.values():
            self._worker.engine.drop(sequence)

    def _forget(self, handle: int, sequence_index: int) -> None:
        request = self._requests[handle]
        del request.sequences[sequence_index]
        del request.sealed[sequence_index]
        admission_over = request.admission is None or request.admission.done()
        if admission_over and not request.sequences:
            self._end(handle)

    def _end(self, handle: int) -> None:
        if request := self._requests.pop(handle, None):
            request.span.end()

    def _refuse(self, handle: int, code: grpc.StatusCode, message: str) -> None:
        """Drops a request that cannot be served here, and says why."""
        if request := self._requests.get(handle):
            request.span.fail(code.name)
        self._cancel(handle, None)
        self._reject(handle, code, message)

    def _reject(self, handle: int, code: grpc.StatusCode, message: str) -> None:
        self._pending.rejected.add(handle=handle, code=code.value[0], message=message)
        self._has_pending.set()
