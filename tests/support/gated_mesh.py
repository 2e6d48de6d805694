"""A mesh with a gate on every hop between its processes, and one kvstore.

Owns the gates; knows where each phase of a request can be held. Bytes of KV never pass a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc

from protos import decode_pb2, kvstore_pb2, status_pb2, status_pb2_grpc
from tests.support.clock import Clock
from tests.support.gate import Gate
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
PHASES = (*HELD_PHASES, "first token", "mid-stream")
BEFORE_HANDOFF = ("queued", "prefill")
WITHOUT_RANK = (*BEFORE_HANDOFF, "put")  # or with one since a moment ago
NUM_TOKENS_MID_STREAM = 20


class GatedMesh(Mesh):
    """Two prefills, two decode ranks, one kvstore; what nobody ends by itself expires soon."""

    def __init__(self, model: Path) -> None:
        self.gates: dict[tuple[str, str], Gate] = {}
        self.clock = Clock(model)
        super().__init__(
            model,
            num_prefill=2,
            num_decode=2,
            worker_flags=("--chunk-tokens", "64"),
            store_flags=("--private-ttl-s", "10", "--quarantine-s", "2"),
            env=self.clock.env,
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
    def in_phase(self, phase: str) -> Iterator[Callable[[Stream], Callable[[], None]]]:
        """Gives a function that waits until a stream is in the phase, and gives what ends the hold.

        No request gets past one of HELD_PHASES before that is called.
        """
        if phase not in HELD_PHASES:
            num_tokens = 1 if phase == "first token" else NUM_TOKENS_MID_STREAM

            def reach_tokens(stream: Stream) -> Callable[[], None]:
                stream.wait_tokens(num_tokens)
                return lambda: None

            yield reach_tokens
            return
        user, method = HELD_PHASES[phase]
        with self.gate(user, self.kvstores[0]).hold(method) as hold:

            def reach_hold(stream: Stream) -> Callable[[], None]:
                hold.wait_reached()
                return hold.release

            yield reach_hold

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
        messages = [m for p in self.decodes for m in self.gate("gateway", p).sent[SESSION]]
        commands = [decode_pb2.SessionRequest.FromString(message) for message in messages]
        return sum(c.HasField("admit") and not c.admit.HasField("handoff") for c in commands)

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
