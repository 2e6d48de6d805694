"""A request's life: tokenize, prefill, decode, usage; retried where that is exact.

Owns the order of the phases and the retries. A retry never repeats or loses a token: before the
first token prefill runs again; later another rank goes on from the tokens received, because
sampling depends on (seed, position) only. Never talks to the client; the outbox does.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from mesh import spans
from mesh.errors import Internal, InvalidArgument, KvmeshError, Unavailable
from mesh.telemetry import Telemetry
from protos import common_pb2, gateway_pb2, prefill_pb2
from services.gateway import validation
from services.gateway.catalog import ServedModel
from services.gateway.commands import Commands
from services.gateway.instance import Instance
from services.gateway.ledger import Ledger
from services.gateway.logprob_text import fill_texts
from services.gateway.outbox import Outbox
from services.gateway.placement import Placement
from services.gateway.prefetch import Prefetch
from services.gateway.prefill_call import call_prefill
from services.gateway.router import Router
from services.gateway.seeds import sequence_seed
from services.gateway.sequence import Sequence
from services.gateway.session import RankSession
from services.gateway.stop_strings import StopStrings
from services.gateway.stores import Stores
from services.gateway.tokenizer import Tokenizer
from services.gateway.trace import RequestTrace
from services.gateway.validation import ValidRequest

_FINAL = ("INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "ALREADY_EXISTS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What every request uses."""

    router: Router
    stores: Stores
    tokenizer: Tokenizer
    telemetry: Telemetry
    max_attempts: int


class Request:
    """One live request. `start` runs it; `abort` and `close` end it at once on every hop."""

    def __init__(
        self, valid: ValidRequest, model: ServedModel, backend: Backend, ledger: Ledger
    ) -> None:
        self.outbox = Outbox()
        self._valid = valid
        self._model = model
        self._backend = backend
        self._ledger = ledger
        self._trace = RequestTrace(backend.telemetry.tracing, valid, model.name)
        self._state = "cancelled"
        self._task: asyncio.Task[None] | None = None
        self._prompt_token_ids: list[int] = []
        self._commands = Commands(valid=valid, prompt_token_ids=[], max_new_tokens=0)
        self._prefetch: Prefetch | None = None
        self._fingerprint = b""
        self._handoff: common_pb2.Handoff | None = None
        # Chosen here, so that the tail can be discarded even when prefill's answer never arrived.
        self._tail_key = secrets.token_bytes(32)
        self._has_sent_info = False
        self._sequences = [self._sequence(i) for i in range(valid.sampling.num_sequences)]
        self.outbox.attach(self._sequences)

    @property
    def num_sequences(self) -> int:
        """Sequences that have not ended."""
        return sum(sequence.finished is None for sequence in self._sequences)

    def start(self) -> None:
        """Begins; everything the client hears comes through the outbox."""
        self._task = asyncio.create_task(self._run())

    def abort(self) -> None:
        """Ends every sequence with ABORTED and closes the answer with usage."""
        if self._task is None or self._task.done():
            return
        self._task.cancel()
        self._state = "aborted"
        self._send_info(())
        for sequence in self._sequences:
            sequence.finish(common_pb2.FINISH_REASON_ABORTED)
        self.outbox.close(self._ledger.usage(self._output_lens))

    def fail(self, error: KvmeshError) -> None:
        """Ends the work and the client's stream with this error."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._state = "failed"
            self.outbox.fail(error)

    def close(self) -> None:
        """The client is gone or has all: ends what still runs."""
        if self._task is not None:
            self._task.cancel()

    def end_trace(self) -> None:
        """Tells the call's span how it ended; before the call ends."""
        reasons = (s.finished.reason for s in self._sequences if s.finished is not None)
        self._trace.end(self._state, self._ledger, self._output_lens, reasons)

    @property
    def _output_lens(self) -> list[int]:
        return [len(sequence.output_token_ids) for sequence in self._sequences]

    async def _run(self) -> None:
        try:
            await self._tokenize()
            await self._prefill()
            await self._decode()
            self._state = "completed"
            self.outbox.close(self._ledger.usage(self._output_lens))
        except Exception as error:  # the edge of this task: the client's stream raises it
            self._state = "failed"
            if isinstance(error, InvalidArgument):
                self._state = "rejected"
                rejected = self._backend.telemetry.instruments.requests_rejected
                rejected.add(1, {"reason": error.reason})
            self.outbox.fail(error)
        finally:
            self._end_prefetch()
            self._discard_tail()
            self._ledger.record(self._backend.telemetry.instruments, self._state, self._output_lens)
            self._trace.phases(self._ledger)

    async def _tokenize(self) -> None:
        prompt, tokenizer = self._valid.prompt, self._backend.tokenizer
        context_len = self._model.context_len
        if prompt.messages:
            texts = (content for _, content in prompt.messages)
            tokenizer.check_len("chat.messages", texts, context_len)
            ids = await tokenizer.encode_chat(prompt.messages)
        elif prompt.text:
            tokenizer.check_len("text", (prompt.text,), context_len)
            ids = await tokenizer.encode(prompt.text)
        else:
            ids = list(prompt.token_ids)
        max_new_tokens = validation.max_new_tokens(self._valid, len(ids), context_len)
        self._prompt_token_ids = ids
        self._commands = Commands(
            valid=self._valid, prompt_token_ids=ids, max_new_tokens=max_new_tokens
        )
        self._ledger.num_prompt_tokens = len(ids)

    async def _prefill(self) -> None:
        """Prefills on an instance, on another one if that fails; takes the first tokens."""
        avoid: set[str] = set()
        for attempt in range(1, self._backend.max_attempts + 1):
            router = self._backend.router
            instance, self._fingerprint = await router.prefill(self._valid.session_id, avoid)
            try:
                command = self._commands.prefill(self._sequences, self._fingerprint, self._tail_key)
                with (
                    instance.load(len(self._prompt_token_ids)),
                    self._trace.attempt(spans.PREFILL_CALL, instance.address, attempt),
                ):
                    self._ledger.on_call()
                    finished = await call_prefill(
                        instance, command, self._on_started, self._on_closing
                    )
            except KvmeshError as error:
                self._end_prefetch()
                self._count_failure("prefill", instance, error, attempt)
                avoid.add(instance.address)
                continue
            self._take_first_tokens(finished)
            return

    async def _decode(self) -> None:
        """Runs the live sequences on a rank; on another, from the tokens so far, if it is lost."""
        avoid: set[str] = set()
        attempt = 0
        while live := [s for s in self._sequences if s.finished is None]:
            attempt += 1
            rank, prefetched = await self._rank(avoid)
            placement = Placement(rank, live, self.outbox, self._ledger)
            try:
                with self._trace.attempt(spans.DECODE_CALL, rank.instance.address, attempt):
                    traceparent = self._backend.telemetry.traceparent()
                    admit = self._commands.admit(
                        live, self._handoff, self._fingerprint, traceparent
                    )
                    await placement.run(admit, prefetched)
            except KvmeshError as error:
                self._count_failure("decode", rank.instance, error, attempt)
                avoid.add(rank.instance.address)
            finally:
                placement.close()
                if placement.num_pulled_tokens == len(self._prompt_token_ids):
                    self._tail_key = b""  # pulled, so the store has dropped the tail
                self._discard_tail()

    async def _rank(self, avoid: set[str]) -> tuple[RankSession, int | None]:
        """A rank, and the handle under which it pulls already if it does."""
        prefetch, self._prefetch = self._prefetch, None
        if prefetch is not None and (handle := prefetch.take()) is not None:
            return prefetch.session, handle
        router = self._backend.router
        return await router.rank(self._fingerprint, self._valid.session_id, avoid), None

    def _sequence(self, index: int) -> Sequence:
        stopping = self._valid.stopping
        return Sequence(
            index=index,
            seed=sequence_seed(self._valid.sampling.seed, index),
            detokenizer=self._backend.tokenizer.detokenizer(
                skip_special_tokens=self._valid.skip_special_tokens
            ),
            stop_strings=StopStrings(stopping.stop_strings, include=stopping.include_stop_string),
            min_new_tokens=stopping.min_new_tokens,
            token_text=self._backend.tokenizer.token_text,
        )

    def _on_started(self, started: prefill_pb2.PrefillStarted) -> None:
        self._ledger.on_started(started)
        if self._valid.num_prompt_logprobs is None:
            self._send_info(())

    def _on_closing(self, closing: prefill_pb2.PrefillClosing) -> None:
        rank = self._backend.router.rank_now(self._fingerprint, self._valid.session_id)
        if rank is not None:
            traceparent = self._backend.telemetry.traceparent()
            command = self._commands.prefetch(closing.handoff, self._fingerprint, traceparent)
            self._prefetch = Prefetch(rank, command)

    def _end_prefetch(self) -> None:
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None

    def _take_first_tokens(self, finished: prefill_pb2.PrefillFinished) -> None:
        ledger = self._ledger
        ledger.prefill_s, ledger.put_s = finished.prefill_s, finished.put_s
        ledger.on_token()
        self._handoff = finished.handoff
        self._tail_key = finished.handoff.tail_key
        self._send_info(finished.prompt_logprobs)
        for first in finished.first_tokens:
            logprobs = [first.logprobs] if first.HasField("logprobs") else []
            sequence = self._sequences[first.sequence_index]
            sequence.push([first.token_id], logprobs, first.finish_reason)
        self.outbox.wake()
        if silent := [s.index for s in self._sequences if not s.output_token_ids]:
            raise Internal(f"prefill gave no first token for sequences {silent}")

    def _send_info(self, prompt_logprobs: Iterable[common_pb2.PositionLogprobs]) -> None:
        if self._has_sent_info:
            return
        self._has_sent_info = True
        info = gateway_pb2.PromptInfo(
            request_id=self._valid.request_id,
            num_prompt_tokens=len(self._prompt_token_ids),
            num_cached_tokens=self._ledger.num_cached_tokens,
            seed=self._valid.sampling.seed,
            prompt_logprobs=prompt_logprobs,
        )
        fill_texts(info.prompt_logprobs, self._backend.tokenizer.token_text)
        self.outbox.put(gateway_pb2.GenerateResponse(prompt_info=info))
        if self._valid.echo:
            for sequence in self._sequences:
                self.outbox.put(sequence.echo(self._prompt_token_ids))

    def _count_failure(
        self, phase: str, instance: Instance, error: KvmeshError, attempt: int
    ) -> None:
        """Takes the instance out of the choice; raises when the request must not be tried again."""
        if error.code.name in _FINAL:
            raise error
        self._backend.router.report(instance, str(error))
        if attempt >= self._backend.max_attempts:
            raise Unavailable(
                f"{phase} failed {attempt} times, the last time on {instance.address}: {error}",
                reason=error.reason,
                retryable=True,
            ) from error
        self._backend.telemetry.instruments.retries.add(1, {"phase": phase, "reason": error.reason})

    def _discard_tail(self) -> None:
        self._handoff = None
        if self._tail_key:
            self._backend.stores.discard(self._tail_key)
            self._tail_key = b""
