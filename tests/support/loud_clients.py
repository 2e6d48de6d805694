"""Clients' part of a load in which every metric moves: what is answered, refused and left.

Owns the order; each step is there for metrics that nothing else moves.
"""

from __future__ import annotations

import contextlib

import grpc

from protos import gateway_pb2
from tests.support.loud_requests import Asker

VOCABULARY = 259


class LoudClients:
    """`run` does everything once."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._mesh = asker.mesh
        self._canaries = asker.canaries

    def run(self) -> None:
        """Every step."""
        self._answer()
        self._refuse()
        self._leave()
        self._crowd()
        self._hold()

    def _answer(self) -> None:
        """Text, chat, several sequences; a reused prefix; a token sampled after a stop."""
        self._mesh.look()
        text, chat = self._asker.request(), self._asker.request()
        text.text = self._canaries.add("prompt", "zqPromptTextCanary5b02 " * 4)
        chat.chat.messages.add(role="user", content=self._canaries.add("chat", "zqChatCanary93fe"))
        several = self._asker.request()
        several.sampling.num_sequences, several.output.logprobs = 3, 2
        for request in (text, chat, several):
            for told in (request.text, *(m.content for m in request.chat.messages)):
                self._canaries.add_ids("prompt", self._asker.token_ids(told))
            self._asker.ask(request)
        request = self._asker.request()
        self._asker.ask(request)
        tokens = self._asker.ask(request).tokens[0]
        request.stopping.stop_token_ids.append(tokens[5])
        self._asker.ask(request)
        self._mesh.watch_page()
        self._mesh.wait_moved("decode_tokens", disposition="discarded")

    def _refuse(self) -> None:
        """Requests and messages that cannot be served, with the secret in what is wrong."""
        mesh, wrong = self._mesh, [self._asker.request() for _ in range(6)]
        wrong[0].stopping.stop_strings.append(wrong[0].stopping.stop_strings[0] * 20)
        wrong[1].cache_salt *= 8
        wrong[2].token_ids.ids.append(VOCABULARY)
        wrong[3].chat.messages.add(role="", content=self._canaries.add("chat", "zqChatCanary2cc1"))
        wrong[4].model = self._canaries.add("prompt", "zqPromptAsModelCanary77a0")
        wrong[5].text = self._canaries.add("prompt", "zqLongPromptCanary6d1e" * 900)
        for request in wrong:
            assert mesh.stream(request).failure() is not grpc.StatusCode.OK
        raw = mesh.channel.unary_stream("/kvmesh.v1.GenerationService/Generate")
        broken = self._asker.request().SerializeToString() + b"\xff\xff"
        ids = self._canaries.add_ids("prompt", [200, 3, 77, 150, 9, 31, 8, VOCABULARY])
        for call in (
            lambda: list(raw(broken, timeout=20)),
            lambda: mesh.calls.Detokenize(gateway_pb2.DetokenizeRequest(token_ids=ids)),
            lambda: mesh.calls.Tokenize(gateway_pb2.TokenizeRequest(model=wrong[4].model)),
        ):
            with contextlib.suppress(grpc.RpcError):
                call()
                raise AssertionError("it was served")

    def _leave(self) -> None:
        """A client that aborts, one that cancels, one that reads slowly."""
        mesh, long = self._mesh, [self._asker.request(400) for _ in range(3)]
        long[0].request_id = "aborted"
        streams = [mesh.stream(request) for request in long]
        with streams[2].paused():
            for stream in streams[:2]:
                stream.wait_tokens(4)
            mesh.calls.Abort(gateway_pb2.AbortRequest(request_id="aborted"))
            streams[1].cancel()
            streams[0].end()
            streams[1].end()
        self._asker.take(streams[2])

    def _crowd(self) -> None:
        """More sequences than the ranks have blocks for, of which some leave in mid-step."""
        mesh = self._mesh

        def is_crowded() -> bool:
            waiting = ("sequences", frozenset({("state", "waiting")}))
            return mesh.look().get(waiting, 0) > 0

        while not mesh.has_moved("kv_prefetches", result="refused"):  # pytest's timeout ends it
            streams = [mesh.stream(self._asker.request(300, 100)) for _ in range(10)]
            mesh.wait_until(is_crowded, "sequences wait")
            streams += [mesh.stream(self._asker.request(8)) for _ in range(3)]
            for stream in streams[:3]:
                stream.wait_tokens(2)
                stream.cancel()
            mesh.watch_page()
            for stream in streams[3:]:
                self._asker.take(stream)
        mesh.wait_moved("decode_preemptions")
        mesh.wait_moved("decode_tokens", disposition="cancelled")

    def _hold(self) -> None:
        """Blocks seen while they are written, and while they wait for their reader."""
        mesh = self._mesh
        for phase, state in (("put", "reserved"), ("between", "private")):
            with mesh.in_phase(phase) as reach:
                stream = mesh.stream(self._asker.request())
                reach(stream)
                mesh.wait_moved("kv_blocks", state=state, tier="memory")
            self._asker.take(stream)
        with mesh.held_before_finish() as hold:  # a rank pulls for a request that never comes
            stream = mesh.stream(self._asker.request())
            hold.wait_reached()
            stream.cancel()
            stream.end()
        mesh.wait_moved("kv_prefetches", result="wasted")
