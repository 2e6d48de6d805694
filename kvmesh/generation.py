"""One running generation, sync and async: an iterator of deltas that ends with a result.

Owns the gRPC call: closing or leaving the iterator cancels the request on every hop.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from kvmesh.answer import Answer, Delta, PromptInfo, Result, Usage
from mesh.errors import Internal, from_rpc_error


class _State:
    """What both kinds share: the answer so far."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._answer = Answer()

    @property
    def prompt(self) -> PromptInfo | None:
        """The prompt's figures and the seed; None before the first message."""
        return self._answer.prompt

    @property
    def usage(self) -> Usage | None:
        """Counts and seconds; None until the stream ended."""
        return self._answer.usage

    def close(self) -> None:
        """Cancels the request if it still runs."""
        self._call.cancel()

    def _finish(self) -> None:
        if self._answer.result is None:
            raise Internal("the stream ended without prompt_info and usage", reason="SHORT_STREAM")


class Generation(_State):
    """Iterate for deltas; `result()` runs to the end. Use as a context manager to cancel early."""

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Delta:
        try:
            for response in self._call:
                if (delta := self._answer.add(response)) is not None:
                    return delta
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        self._finish()
        raise StopIteration

    def result(self) -> Result:
        """The whole answer, waiting for what is missing. Raises what iterating raises."""
        for _ in self:
            pass
        assert self._answer.result is not None, "_finish raises on a short stream"
        return self._answer.result

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncGeneration(_State):
    """As Generation, for `async for` and `async with`."""

    def __aiter__(self) -> AsyncGeneration:
        return self

    async def __anext__(self) -> Delta:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
                if (delta := self._answer.add(response)) is not None:
                    return delta
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        self._finish()
        raise StopAsyncIteration

    async def result(self) -> Result:
        """The whole answer, waiting for what is missing. Raises what iterating raises."""
        async for _ in self:
            pass
        assert self._answer.result is not None, "_finish raises on a short stream"
        return self._answer.result

    async def __aenter__(self) -> AsyncGeneration:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
