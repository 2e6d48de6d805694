"""Generate calls that run while a test breaks things around them.

Owns one thread a call. An answer is compared whole: tokens, text, log probabilities, finishes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from protos import gateway_pb2, gateway_pb2_grpc
from tests.support.generate import Answer

TIMEOUT_S = 60.0


class Stream:
    """One Generate call, read by its own thread."""

    def __init__(
        self,
        stub: gateway_pb2_grpc.GenerationServiceStub,
        request: gateway_pb2.GenerateRequest,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.request = request
        self.answer = Answer()
        self.error: grpc.RpcError | None = None
        self._news = threading.Condition()
        self._reads = threading.Event()
        self._reads.set()
        self._is_over = False
        self._call = stub.Generate(request, timeout=timeout_s)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def num_tokens(self) -> int:
        """Tokens received so far, over all sequences."""
        return sum(map(len, self.answer.tokens.values()))

    @property
    def is_over(self) -> bool:
        """Whether the answer or an error has ended the call."""
        return self._is_over

    def wait_tokens(self, num_tokens: int, timeout_s: float = TIMEOUT_S) -> None:
        """Blocks until that many tokens came; fails when the call ends before."""
        with self._news:
            enough = self._news.wait_for(
                lambda: self._is_over or self.num_tokens >= num_tokens, timeout_s
            )
        assert enough and self.num_tokens >= num_tokens, (self.num_tokens, self.error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes no message while inside: windows fill, and the server has to wait."""
        self._reads.clear()
        try:
            yield
        finally:
            self._reads.set()

    def cancel(self) -> None:
        """The client cancels."""
        self._call.cancel()

    def end(self, timeout_s: float = TIMEOUT_S) -> grpc.RpcError | None:
        """Waits for the end of the call; the error it ended with, if any."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"no end after {self.num_tokens} tokens"
        return self.error

    def failure(self, timeout_s: float = TIMEOUT_S) -> grpc.StatusCode:
        """Waits for the error the call ends with."""
        error = self.end(timeout_s)
        assert error is not None, "the call ended well"
        return error.code()  # pyright: ignore[reportAttributeAccessIssue]

    def result(self, timeout_s: float = TIMEOUT_S) -> Answer:
        """Waits for the whole answer."""
        if error := self.end(timeout_s):
            raise error
        assert self.answer.usage is not None, "the stream ended without usage"
        return self.answer

    def _read(self) -> None:
        try:
            for response in self._call:
                with self._news:
                    self.answer.add(response)
                    self._news.notify_all()
                self._reads.wait()
        except grpc.RpcError as error:
            self.error = error
        with self._news:
            self._is_over = True
            self._news.notify_all()


def same_answer(answer: Answer, expected: Answer) -> None:
    """Fails unless both say the same to the last bit."""
    assert answer.tokens == expected.tokens
    assert answer.text == expected.text
    assert answer.finished == expected.finished
    assert answer.logprobs == expected.logprobs
    assert answer.usage is not None and expected.usage is not None
    assert answer.usage.num_output_tokens == expected.usage.num_output_tokens
    assert answer.usage.num_prompt_tokens == expected.usage.num_prompt_tokens
