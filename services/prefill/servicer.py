"""PrefillService: one prompt in, sealed blocks and first tokens out.

Owns a prompt's life on this instance: memory, pull, chunks, hand-off. Stops at the first token.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from engine.sequence import Sequence as EngineSequence
from engine.sequence import SequenceState, StepItem, StepOutcome, finish_reason_for
from kv.block import block_keys, prefix_identity, tenant_id
from mesh.errors import Internal
from protos import common_pb2, prefill_pb2, prefill_pb2_grpc
from services import wire
from services.prefill.sending import Sending
from services.prefill.trace import PromptTrace
from services.worker import Worker

if TYPE_CHECKING:
    import grpc


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Serves Prefill calls over one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._prompts: dict[int, Prompt] = {}
        self._ids = itertools.count(1)
        worker.listeners.append(self._on_step)
        worker.failure_listeners.append(self._on_failure)
        worker.engine.tell_written(self._on_written)

    @property
    def num_requests(self) -> int:
        """Prompts in flight."""
        return len(self._prompts)

    def check(self) -> None:
        """Asserts that no two prompts share a block that neither has finished writing."""
        blocks = [block for prompt in self._prompts.values() for block in prompt.blocks]
        assert len(blocks) == len(set(blocks)), "two prompts hold one block"

    async def Prefill(  # noqa: N802 - gRPC method name
        self,
        request: prefill_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse],
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        """Computes one prompt; cancelling the call frees everything."""
        self._worker.check_request(request.fingerprint, len(request.prompt_token_ids))
        prompt_id = next(self._ids)
        prompt = Prompt(self._worker, prompt_id, request)
        self._prompts[prompt_id] = prompt
        try:
            yield prefill_pb2.PrefillResponse(started=await prompt.start())
            if prompt.can_go_on:
                yield prefill_pb2.PrefillResponse(closing=await prompt.closing())
            finished = await prompt.finish()
            prompt.is_handed_off = True
            yield prefill_pb2.PrefillResponse(finished=finished)
        finally:
            if prompt.is_handed_off:
                self._worker.spawn(self._see_off(prompt_id))
            else:
                self._end(prompt_id)

    async def _see_off(self, prompt_id: int) -> None:
        """Waits for what was handed off to be sent: its reader does not need this call any more."""
        try:
            await self._prompts[prompt_id].sent()
        finally:
            self._end(prompt_id)

    def _end(self, prompt_id: int) -> None:
        self._prompts.pop(prompt_id).close()

    def _on_step(self, outcome: StepOutcome) -> None:
        instruments = self._worker.telemetry.instruments
        num_computed = 0
        for item in outcome.items:
            num_computed += item.num_computed_after - item.num_computed_before
            self._prompts[item.sequence.key].on_step(item, outcome)
        for prompt in self._prompts.values():
            prompt.look_for_last_chunk()
        instruments.kv_prefix_tokens.add(num_computed, {"result": "computed"})

    def _on_written(self, sequence: EngineSequence, num_tokens: int) -> None:
        if prompt := self._prompts.get(sequence.key):
            prompt.on_written(num_tokens)

    def _on_failure(self, sequences: Sequence[EngineSequence], error: BaseException) -> None:
        for sequence in sequences:
            if prompt := self._prompts.get(sequence.key):
                prompt.fail(error)


class Prompt:
    """One prompt on this instance, from arrival to hand-off."""

    def __init__(self, worker: Worker, key: int, request: prefill_pb2.PrefillRequest) -> None:
        self._worker = worker
        self._request = request
        self._arrived_at = time.monotonic()
        self._trace = PromptTrace(worker.telemetry.tracing)
        self._token_ids = list(request.prompt_token_ids)
        self._root = worker.root(request.cache_salt)
        self._keys = block_keys(self._root, self._token_ids, worker.block_tokens)
        self._tail_key = request.tail_key if len(self._token_ids) % worker.block_tokens else b""
        self.is_handed_off = False
        self._num_sent = 0
        self._sending: Sending | None = None
        self._rest: asyncio.Task[None] | None = None
        self._prompt_logprobs: list[common_pb2.PositionLogprobs] = []
        self._last_chunk = asyncio.Event()
        self._computed: asyncio.Future[StepItem] = asyncio.get_running_loop().create_future()
        self._compute_started_at = self._computed_at = 0.0
        self._sequence = EngineSequence(
            key=key,
            prompt_token_ids=self._token_ids,
            seeds=tuple(state.seed for state in request.sequences),
            sampling=wire.sampling_params(request.sampling),
            stopping=wire.stopping_params(request.stopping, request.eos_token_ids),
            num_logprobs=request.logprobs if request.HasField("logprobs") else None,
            num_prompt_logprobs=(
                request.prompt_logprobs if request.HasField("prompt_logprobs") else None
            ),
            priority=request.priority,
        )

    @property
    def blocks(self) -> list[int]:
        """Its blocks: empty before it has memory."""
        return self._sequence.blocks

    @property
    def can_go_on(self) -> bool:
        """Whether a sequence may need a decode rank after its first token."""
        return self._sequence.stopping.max_new_tokens > 1

    async def start(self) -> prefill_pb2.PrefillStarted:
        """Takes memory, pulls the sealed prefix and queues the rest for computing."""
        worker, request = self._worker, self._request
        num_tokens, block_tokens = len(self._token_ids), worker.block_tokens
        blocks = await worker.engine.allocate(-(-num_tokens // block_tokens), request.priority)
        self._sequence.blocks = blocks
        # The last token is always computed here: its logits choose the first token.
        num_reusable = (num_tokens - 1) // block_tokens
        if request.HasField("prompt_logprobs"):
            num_reusable = 0
        pulled, _ = await worker.pull(self._keys[:num_reusable], blocks)
        self._compute_started_at = pulled.ended_at
        self._trace.on_memory(self._arrived_at, pulled.began_at)
        num_cached = pulled.num_blocks * block_tokens
        self._trace.begin(self._compute_started_at, num_tokens - num_cached)
        worker.telemetry.instruments.kv_prefix_tokens.add(num_cached, {"result": "hit"})
        tenant = tenant_id(request.cache_salt)
        self._sending = Sending(worker, self._keys, pulled.num_blocks, self._tail_key, tenant)
        self._num_sent = pulled.num_blocks
        self._sequence.num_computed = num_cached
        worker.engine.add(self._sequence)
        return prefill_pb2.PrefillStarted(
            num_cached_tokens=num_cached,
            queue_s=self._compute_started_at - self._arrived_at,
            lookup_s=pulled.lookup_s,
            get_s=pulled.get_s,
            verify_s=pulled.verify_s,
        )

    async def closing(self) -> prefill_pb2.PrefillClosing:
        """Waits until a reader can wait for all of it: slots reserved, the last chunk under way."""
        assert self._sending is not None, "started before it closes"
        handoff = self._handoff(self._tail_key)
        await self._sending.reserved()
        self.look_for_last_chunk()
        await self._last_chunk.wait()
        return prefill_pb2.PrefillClosing(handoff=handoff)

    async def finish(self) -> prefill_pb2.PrefillFinished:
        """Waits for the last chunk, not for its way to the store: the reader waits for that."""
        item = await self._computed
        handoff = await self._hand_off()
        handed_off_at = time.monotonic()
        self._trace.on_handed_off(self._computed_at, handed_off_at)
        self._worker.count_tokens(len(item.token_ids))
        return prefill_pb2.PrefillFinished(
            first_tokens=[self._first_token(index, item) for index in range(len(item.token_ids))],
            handoff=handoff,
            prompt_logprobs=self._prompt_logprobs,
            prefill_s=self._computed_at - self._compute_started_at,
            put_s=handed_off_at - self._computed_at,
            computed_at=self._computed_at,
        )

    def look_for_last_chunk(self) -> None:
        """After any step: whether this prompt's last chunk is with the engine now, or done."""
        sequence, num_tokens = self._sequence, len(self._token_ids)
        is_last = num_tokens - sequence.num_computed <= self._worker.settings.chunk_tokens
        if is_last and sequence.num_scheduled >= num_tokens:
            self._last_chunk.set()

    def on_written(self, num_tokens: int) -> None:
        """KV of the first num_tokens is in the blocks: they go out, to be sealed after the step."""
        assert self._sending is not None, "started before it is computed"
        num_full, tail_len = divmod(num_tokens, self._worker.block_tokens)
        if num_full > self._num_sent:
            first, self._num_sent = self._num_sent, num_full
            self._sending.send(first, self._sequence.blocks[first:num_full])
        if num_tokens == len(self._token_ids) and tail_len:
            self._sending.send_tail(self._sequence.blocks[-1], tail_len)

    def on_step(self, item: StepItem, outcome: StepOutcome) -> None:
        """Takes one step's progress: full blocks go out while the next chunk computes."""
        item.keep_blocks = item.is_finished
        self._trace.on_step(item, outcome)
        self._prompt_logprobs.extend(wire.position_logprobs(p) for p in item.prompt_logprobs)
        if self._sending is not None:
            self.on_written(item.num_computed_after)
            self._sending.seal()
        if item.token_ids and not self._computed.done():
            self._computed_at = outcome.done_at
            self._trace.on_computed(outcome.done_at)
            self._computed.set_result(item)

    def fail(self, error: BaseException) -> None:
        """The step that held this prompt failed: its blocks are free already."""
        if self._sending is not None:
            self._sending.drop()
        if not self._computed.done():
            failure = Internal(f"prefill step failed: {error}", reason="STEP_FAILED")
            self._trace.fail(failure.reason)
            self._computed.set_exception(failure)
            self._last_chunk.set()

    def close(self) -> None:
        """Frees everything. What is still being sent is dropped: no unsealed block is ever read."""
        self._trace.close()
        if self._rest is not None:
            self._rest.cancel()
        if self._sending is not None:
            self._sending.close()
        if self._computed.done() and not self._computed.cancelled():
            self._computed.exception()
        self._computed.cancel()
        if self._request.tail_key and not self.is_handed_off:
            self._worker.spawn(self._worker.store.discard([self._request.tail_key]))
        if self._sequence.state in (SequenceState.NEW, SequenceState.FINISHED):
            self._worker.release(self._sequence.blocks)
        else:
            self._worker.engine.drop(self._sequence)

    async def _hand_off(self) -> common_pb2.Handoff:
        """What a reader can wait for; it computes again what is not sealed soon."""
        assert self._sending is not None, "started before it is finished"
        wants_tail = self._request_decodes
        self._rest = asyncio.ensure_future(self._sending.finish(wants_tail=wants_tail))
        await self._sending.reserved()
        return self._handoff(self._tail_key if wants_tail else b"")

    def _handoff(self, tail_key: bytes) -> common_pb2.Handoff:
        return common_pb2.Handoff(
            tail_key=tail_key, num_tokens=len(self._token_ids), identity=self._identity
        )

    @functools.cached_property
    def _identity(self) -> bytes:
        """Hashed once, while the prompt is computed."""
        return prefix_identity(self._root, self._token_ids, self._worker.block_tokens)

    async def sent(self) -> None:
        """Waits until all that can be sealed is."""
        assert self._rest is not None, "finished before it is sent"
        await self._rest

    @property
    def _request_decodes(self) -> bool:
        """Whether any sequence goes on after its first token."""
        item = self._computed.result()
        return any(
            finish_reason_for(token_id, 1, self._sequence.stopping) is None
            for token_id in item.token_ids
        )

    def _first_token(self, index: int, item: StepItem) -> prefill_pb2.FirstToken:
        token_id = item.token_ids[index]
        first = prefill_pb2.FirstToken(
            sequence_index=self._request.sequences[index].sequence_index,
            token_id=token_id,
            finish_reason=wire.finish_reason(
                finish_reason_for(token_id, 1, self._sequence.stopping)
            ),
        )
        if item.logprobs:
            first.logprobs.CopyFrom(wire.position_logprobs(item.logprobs[index]))
        return first
