"""A mesh with a gate on every hop between its processes, and one kvstore.

Owns the gates; knows where each phase of a request can be held. Bytes of KV never pass a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from protos import decode_pb2, kvstore_pb2, prefill_pb2, status_pb2, status_pb2_grpc
from tests.support.clock import Clock
from tests.support.gate import Gate, Hold
from tests.support.mesh import Mesh, Process
from tests.support.streams import Stream

STORE = "/kvmesh.v1.KvStoreService"
PREFILL = "/kvmesh.v1.PrefillService/Prefill"
SESSION = "/kvmesh.v1.DecodeService/Session"
STATUS = "/kvmesh.v1.StatusService/GetStatus"
HELD_PHASES = {  # phase: whose hop to the store, the method held
    "queued": ("prefill", f"{STORE}/Lookup"),
    "prefill": ("prefill", f"{STORE}/Reserve"),
    "put": ("prefill", f"{STORE}/Seal"),
    "between": ("decode", f"{STORE}/Lookup"),
    "get": ("decode", f"{STORE}/Release"),
}
# Here prefill has finished, but the gateway does not know: a rank pulls, no request is admitted.
PREFETCH = "prefetch"
PHASES = ("queued", "prefill", "put", PREFETCH, "between", "get", "first token", "mid-stream")
BEFORE_HANDOFF = ("queued", "prefill")
WITHOUT_RANK = (*BEFORE_HANDOFF, "put", PREFETCH)  # or with one since a moment ago
ON_RANK = ("between", "get")  # a prefetch comes here too: admissions are waited for
NUM_TOKENS_MID_STREAM = 20


@dataclass(frozen=True)
class Holds:
    """Holds on several gates as one."""

    holds: list[Hold]
    wait_reached: Callable[[], None]

    def release(self) -> None:
        """Lets everything through."""
        for hold in self.holds:
            hold.release()


class GatedMesh(Mesh):
    """Two prefills, two decode ranks, one kvstore; what nobody ends by itself expires soon."""

    def __init__(
        self,
        model: Path,
        env: dict[str, str] | None = None,
        *,
        worker_flags: Sequence[str] = (),
        store_flags: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.gates: dict[tuple[str, str], Gate] = {}
        self.clock = Clock(model)
        super().__init__(
            model,
            num_prefill=2,
            num_decode=2,
            worker_flags=("--chunk-tokens", "64", *worker_flags),
            store_flags=("--private-ttl-s", "10", "--quarantine-s", "2", *store_flags),
            env={**self.clock.env, **(env or {})},
            **options,
        )

    def route(self, user: str, process: Process) -> str:
        """The gate for this user in front of this process."""
        hop = (user, process.address)
        if hop not in self.gates:
            self.gates[hop] = Gate(process.address)
        return self.gates[hop].address

    def gate(self, user: str, process: Process) -> Gate:
        """The gate of one hop."""
        return self.gates[user, process.address]

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[Callable[..., Callable[[], None]]]:
        """Gives a function that waits until streams are in the phase, and gives what ends the hold.

        No request gets past one of HELD_PHASES, or PREFETCH, before that is called. With ON_RANK
        all the streams are there, else the first.
        """
        if phase in HELD_PHASES:
            user, method = HELD_PHASES[phase]
            held = self.gate(user, self.kvstores[0]).hold(method)
        elif phase == PREFETCH:
            held = self.held_before_finish()
        else:
            held = nullcontext()
        num_admits = len(self.sent("admit"))
        with held as hold:

            def reach(*streams: Stream) -> Callable[[], None]:
                if hold is None:
                    streams[0].wait_tokens(1 if phase == "first token" else NUM_TOKENS_MID_STREAM)
                    return lambda: None
                hold.wait_reached()
                if phase in ON_RANK:
                    wanted = num_admits + len(streams)
                    self.wait_until(lambda: len(self.sent("admit")) >= wanted, "all are admitted")
                return hold.release

            yield reach

    @contextmanager
    def held_before_finish(self) -> Iterator[Holds]:
        """Holds what prefill answers last, behind PrefillClosing."""

        def is_last(message: bytes) -> bool:
            return prefill_pb2.PrefillResponse.FromString(message).HasField("finished")

        num_sent = len(self.sent("prefetch"))
        with ExitStack() as stack:
            gates = [self.gate("gateway", process) for process in self.prefills]
            holds = [stack.enter_context(g.hold(PREFILL, "response", is_last)) for g in gates]

            def is_reached() -> bool:
                is_held = any(hold.num_held for hold in holds)
                return is_held and len(self.sent("prefetch")) > num_sent

            yield Holds(holds, lambda: self.wait_until(is_reached, "a rank prefetches"))

    def instances(self) -> list[status_pb2.InstanceStatus]:
        """All processes as the gateway knows them, itself first."""
        with grpc.insecure_channel(self.admin_address) as channel:
            stub = status_pb2_grpc.StatusServiceStub(channel)
            return list(stub.GetStatus(status_pb2.GetStatusRequest(), timeout=5).instances)

    def num_prefills(self) -> int:
        """Prefill calls that went to prefill processes so far."""
        return sum(len(self.gate("gateway", p).sent[PREFILL]) for p in self.prefills)

    def num_resumes(self) -> int:
        """Admissions so far that go on from tokens: their hand-off was used or lost before."""
        return sum(not command.admit.HasField("handoff") for command in self.sent("admit"))

    def sent(self, kind: str) -> list[decode_pb2.SessionRequest]:
        """Commands of one kind (admit, cancel, prefetch) that ranks got from the gateway so far."""
        messages = [m for p in self.decodes for m in self.gate("gateway", p).sent[SESSION]]
        commands = [decode_pb2.SessionRequest.FromString(message) for message in messages]
        return [command for command in commands if command.HasField(kind)]  # pyright: ignore[reportArgumentType]

    def pulled_tokens(self, rank: Process) -> list[int]:
        """Tokens pulled for each request that was placed on a rank so far."""
        answers = [answer for _, answer in self.gate("gateway", rank).seen[SESSION]]
        responses = [decode_pb2.SessionResponse.FromString(answer) for answer in answers]
        return [a.num_pulled_tokens for response in responses for a in response.admitted]

    def arena_of(self, store: Process) -> int:
        """Address of the store's arena in its own memory, as it told a worker."""
        answers = self.gate("decode", store).seen[f"{STORE}/Connect"]
        return kvstore_pb2.ConnectResponse.FromString(answers[-1][1]).agent.arena_address

    def close(self) -> None:
        """Ends processes, then gates."""
        super().close()
        with ExitStack() as stack:
            for gate in self.gates.values():
                stack.callback(gate.close)
