"""A fake decode rank over real gRPC, for tests of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos import decode_pb2, decode_pb2_grpc, status_pb2
from tests.services.gateway.fake_mesh import FakeWorker, logprobs_for, next_token, reason_for


@dataclass
class FakeDecode(FakeWorker, decode_pb2_grpc.DecodeServiceServicer):
    """A rank that makes one token per live sequence and step; dies or pauses when told."""

    role: status_pb2.Role = status_pb2.ROLE_DECODE
    admits: list[decode_pb2.Admit] = field(default_factory=list)
    cancels: list[decode_pb2.Cancel] = field(default_factory=list)
    prefetches: list[decode_pb2.Prefetch] = field(default_factory=list)
    reject: grpc.StatusCode | None = None
    num_pulled: int | None = None
    die_after_steps: int = 0
    pause_after_steps: int = 0
    num_steps: int = 0
    live: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    prefetched: asyncio.Event = field(default_factory=asyncio.Event)
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    _dying: list[asyncio.Task[None]] = field(default_factory=list)

    def register(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    async def Session(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[decode_pb2.SessionResponse]:
        self.live.clear()
        work = asyncio.Event()
        news: list[decode_pb2.SessionResponse] = []

        async def read() -> None:
            async for command in request_iterator:
                self._command(command, news)
                work.set()

        reader = asyncio.ensure_future(read())
        try:
            while True:
                await work.wait()
                while news:
                    yield news.pop(0)
                if not self.live:
                    work.clear()
                    continue
                if self.pause_after_steps and self.num_steps >= self.pause_after_steps:
                    await self.resumed.wait()
                    self.pause_after_steps = 0
                response = self._step()
                if response.outputs:
                    yield response
                if self.die_after_steps and self.num_steps >= self.die_after_steps:
                    self._dying.append(asyncio.ensure_future(self.kill()))
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
        finally:
            reader.cancel()

    def _command(
        self, command: decode_pb2.SessionRequest, news: list[decode_pb2.SessionResponse]
    ) -> None:
        if command.HasField("cancel"):
            cancel = command.cancel
            self.cancels.append(cancel)
            for key in list(self.live):
                if key[0] == cancel.handle and (
                    not cancel.HasField("sequence_index") or key[1] == cancel.sequence_index
                ):
                    del self.live[key]
            self.cancelled.set()
            return
        if command.HasField("prefetch"):
            self.prefetches.append(command.prefetch)
            self.prefetched.set()
            return
        admit = command.admit
        self.admits.append(admit)
        self.admitted.set()
        if self.reject is not None:
            rejected = decode_pb2.Rejected(
                handle=admit.handle, code=self.reject.value[0], message="told to reject"
            )
            news.append(decode_pb2.SessionResponse(rejected=[rejected]))
            return
        num_pulled = len(admit.prompt_token_ids) if self.num_pulled is None else self.num_pulled
        admitted = decode_pb2.Admitted(
            handle=admit.handle, num_pulled_tokens=num_pulled, get_s=0.04
        )
        news.append(decode_pb2.SessionResponse(admitted=[admitted]))
        for state in admit.sequences:
            self.live[admit.handle, state.sequence_index] = list(state.output_token_ids)

    def _step(self) -> decode_pb2.SessionResponse:
        self.num_steps += 1
        response = decode_pb2.SessionResponse(step=self.num_steps)
        by_handle = {admit.handle: admit for admit in self.admits}
        for (handle, index), output in list(self.live.items()):
            admit = by_handle[handle]
            seed = next(s.seed for s in admit.sequences if s.sequence_index == index)
            token = next_token([*admit.prompt_token_ids, *output], seed)
            output.append(token)
            reason = reason_for(token, len(output), admit)
            response.outputs.add(
                handle=handle,
                sequence_index=index,
                token_ids=[token],
                logprobs=logprobs_for(token, admit),
                finish_reason=reason,
            )
            if reason:
                del self.live[handle, index]
        return response
