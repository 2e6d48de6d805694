"""The gateway's stream to a rank that is not there."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from mesh.channel import open_channel
from protos import status_pb2
from services.gateway import session as session_module
from services.gateway.instance import Instance
from services.gateway.session import RankSession


async def test_attempts_on_an_absent_rank_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    monkeypatch.setattr(session_module, "MIN_BACKOFF_S", 0.001)
    monkeypatch.setattr(session_module, "MAX_BACKOFF_S", 0.001)
    address = "127.0.0.1:1"  # nobody listens there
    instance = Instance(status_pb2.ROLE_DECODE, address, open_channel(address))
    session = RankSession(instance, on_change=lambda: None)
    stub, attempts, third = session._stub, [], asyncio.Event()

    class CountingStub:
        def Session(self, *args: Any) -> Any:  # noqa: N802 - gRPC method name
            attempts.append(stub.Session(*args))
            if len(attempts) == 3:
                third.set()
            return attempts[-1]

    session._stub = CountingStub()  # type: ignore[assignment]
    session.start()
    await asyncio.wait_for(third.wait(), 20)
    await session.close()
    await instance.channel.close()
    attempts.clear()
    gc.collect()
    await asyncio.sleep(0)  # lets finalizers of collected generators run
    assert problems == []
    assert not session.is_open


async def test_a_rank_lost_while_its_session_opens_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """grpc's wait for a connection never ends when its call was cancelled just before."""
    monkeypatch.setattr(session_module, "MIN_BACKOFF_S", 0.001)
    instance = Instance(status_pb2.ROLE_DECODE, "rank:1", open_channel("127.0.0.1:1"))
    session = RankSession(instance, on_change=lambda: None)
    waits, again = [], asyncio.Event()

    class DeafCall:
        async def wait_for_connection(self) -> None:
            waits.append(self)
            if len(waits) == 2:
                again.set()
            asyncio.get_running_loop().call_soon(lambda: instance.lose("silent"))
            await asyncio.Event().wait()

        def cancel(self) -> None:
            """Does not end the wait."""

    class DeafStub:
        def Session(self) -> DeafCall:  # noqa: N802 - gRPC method name
            return DeafCall()

    session._stub = DeafStub()  # type: ignore[assignment]
    session.start()
    await asyncio.wait_for(again.wait(), 20)
    await session.close()
    await instance.channel.close()
