"""One Prefill call on one instance.

Owns the call's life: it ends with the request's task, with the instance, or with its answer. Never
retries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from mesh.errors import Unavailable, from_rpc_error
from protos import prefill_pb2, prefill_pb2_grpc
from services.gateway.instance import Instance
from services.gateway.session import END

# Longest computation of one prompt; the client's own deadline cancels earlier.
PREFILL_TIMEOUT_S = 600.0


async def call_prefill(
    instance: Instance,
    request: prefill_pb2.PrefillRequest,
    on_started: Callable[[prefill_pb2.PrefillStarted], None],
    on_closing: Callable[[prefill_pb2.PrefillClosing], None],
) -> prefill_pb2.PrefillFinished:
    """Runs the call until it has finished; cancelling the caller cancels it at the instance.

    Raises the instance's error as a KvmeshError, Unavailable when it is lost or ends early.
    """
    call = prefill_pb2_grpc.PrefillServiceStub(instance.channel).Prefill(
        request, timeout=PREFILL_TIMEOUT_S
    )
    lost: list[str] = []
    finished = None

    def lose(reason: str) -> None:
        lost.append(reason)
        call.cancel()

    try:
        with instance.when_lost(lose):
            finished = await _read(call, on_started, on_closing)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    except asyncio.CancelledError:
        if not lost:  # the request's task is being cancelled, not the call by `lose`
            raise
        raise _gone(instance, lost[0]) from None
    finally:
        if finished is None:
            call.cancel()
        else:
            instance.see_off(call)
    if finished is None:
        raise _gone(instance, "the call ended without an answer")
    return finished


async def _read(
    call: Any,  # grpcio has no type for the end of a stream
    on_started: Callable[[prefill_pb2.PrefillStarted], None],
    on_closing: Callable[[prefill_pb2.PrefillClosing], None],
) -> prefill_pb2.PrefillFinished | None:
    """The answer; None when the call ends without one."""
    while (response := await call.read()) is not END:
        event = response.WhichOneof("event")
        if event == "started":
            on_started(response.started)
        elif event == "closing":
            on_closing(response.closing)
        elif event == "finished":
            return response.finished
    return None


def _gone(instance: Instance, why: str) -> Unavailable:
    return Unavailable(f"prefill {instance.address}: {why}", reason="PREFILL_LOST", retryable=True)
