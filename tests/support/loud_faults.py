"""Faults' part of a load in which every metric moves: lies, broken promises, spoiled disks, deaths.

Owns the order; each step is there for metrics that nothing else moves.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil

from mesh.instruments import ERROR_REASON
from protos import decode_pb2, kvstore_pb2, prefill_pb2
from tests.support.gated_mesh import PREFILL, SESSION, STORE
from tests.support.injectors import incarnation_of, kill, revive
from tests.support.loud_requests import Asker
from tests.support.mesh import Process

FETCH, LOOKUP, PIN, RELEASE, RESERVE = (
    f"{STORE}/{name}" for name in ("Fetch", "Lookup", "Pin", "Release", "Reserve")
)
TTL_S = 0.5
BAD_TOKEN = 2**31 - 1


class LoudFaults:
    """`run` does everything once; the mesh lives on without a receiver."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._mesh = asker.mesh

    def run(self) -> None:
        """Every step."""
        self._deceive()
        self._cut()
        self._promise()
        self._outgrow_memory()
        self._spoil_files()
        self._refuse_writes()
        self._break_requests()
        self._kill()
        self._kill_store()
        self._starve()
        self._drop_exports()

    def _deceive(self) -> None:
        """Answers of the store, and of prefill, that are not what they should be."""
        stores = [self._mesh.gate("decode", self._mesh.kvstores[0])]
        prefills = [self._mesh.gate("gateway", process) for process in self._mesh.prefills]
        expired = kvstore_pb2.ReleaseResponse(outcome=kvstore_pb2.ReleaseResponse.OUTCOME_EXPIRED)
        for reason, method, rewrite in (
            ("slot", LOOKUP, _misplaced),
            ("digest", LOOKUP, _misdigested),
            ("lease", RELEASE, lambda _: expired.SerializeToString()),
            ("identity", PREFILL, _misnamed),
        ):
            with contextlib.ExitStack() as stack:
                for gate in prefills if method == PREFILL else stores:
                    stack.enter_context(gate.rewritten(method, rewrite))
                self._asker.ask(self._asker.request())
                self._mesh.wait_moved("kv_verify_failures", reason=reason)

    def _cut(self) -> None:
        """A path to the store that is gone in mid-call."""
        gate = self._mesh.gate("decode", self._mesh.kvstores[0])
        for reason, method in (("lookup", LOOKUP), ("timeout", FETCH)):
            with gate.hold(method) as hold:
                stream = self._mesh.stream(self._asker.request())
                hold.wait_reached()
                with gate.cut():
                    hold.release()
                    self._asker.take(stream)
            self._mesh.wait_moved("kv_verify_failures", reason=reason)
            self._asker.settle()

    def _promise(self) -> None:
        """A lease, a reservation and a pin that nobody ends; a block dropped while it is lent."""
        mesh, (rank, *_) = self._mesh, self._mesh.decodes
        gate, incarnation = mesh.gate("decode", mesh.kvstores[0]), incarnation_of(rank)
        self._asker.ask(self._asker.request())
        lookups = map(kvstore_pb2.LookupRequest.FromString, gate.sent[LOOKUP])
        last = [request for request in lookups if len(request.keys) > 1][-1]
        own: dict[str, Any] = {"incarnation": incarnation, "ttl_s": TTL_S}
        sized = {**own, "num_bytes": last.num_bytes}
        spare = [self._asker.rng.randbytes(32)]

        def send(method: str, message: Any) -> None:
            gate.send(method, message.SerializeToString())

        send(PIN, kvstore_pb2.PinRequest(keys=last.keys, **own))
        send(RESERVE, kvstore_pb2.ReserveRequest(keys=spare, attempt=2**40, **sized))
        mesh.wait_moved("kv_blocks", state="quarantined", tier="memory")
        send(LOOKUP, kvstore_pb2.LookupRequest(keys=last.keys, attempt=2**40 + 1, **sized))
        for promise in ("lease", "reservation", "pin"):
            mesh.wait_moved("kv_leases_expired", promise=promise)
        lent = {**sized, "ttl_s": 20.0}
        send(LOOKUP, kvstore_pb2.LookupRequest(keys=last.keys, attempt=2**40 + 2, **lent))
        send(RELEASE, kvstore_pb2.ReleaseRequest(incarnation=incarnation, corrupt_keys=last.keys))
        mesh.wait_moved("kv_blocks", state="dropped", tier="memory")

    def _outgrow_memory(self) -> None:
        """More prefixes than a tenant, the store's memory and its disk may hold."""
        salt, many = self._asker.request().cache_salt, [self._asker.request(4) for _ in range(30)]
        for request in many[:4]:
            request.cache_salt = salt
        for request in many:
            self._asker.ask(request)
        for request in many[-12:]:
            self._asker.ask(request)
        for tier, cause in (("memory", "quota"), ("memory", "room"), ("disk", "room")):
            self._mesh.wait_moved("kv_evictions", tier=tier, cause=cause)
        for move in ("demoted", "promoted"):
            self._mesh.wait_moved("kv_tier_blocks", tier="disk", move=move)

    def _spoil_files(self) -> None:
        """Files that are spoiled, gone, or cut off before the store starts."""
        spoilers: tuple[tuple[str, Callable[[Path], None]], ...] = (
            ("disk_digest", lambda path: _flip(path, -1)),
            ("disk_header", lambda path: _flip(path, 20)),
            ("disk_read", lambda path: path.unlink(missing_ok=True)),
        )
        for reason, spoil in spoilers:
            many = [self._asker.request(4) for _ in range(14)]
            for request in many:
                self._asker.ask(request)
            self._mesh.wait_moved("kv_blocks", state="sealed", tier="disk")
            for path in self._mesh.disk.glob("*.kv"):
                spoil(path)
            for request in many:
                self._asker.ask(request)
            self._mesh.wait_moved("kv_verify_failures", reason=reason)
        (self._mesh.disk / f"{'ab' * 32}.kv").write_bytes(b"cut off")
        kill(self._mesh.kvstores[0])
        revive(self._mesh, self._mesh.kvstores[0])
        self._asker.settle()
        self._mesh.wait_moved("kv_verify_failures", reason="disk_start")

    def _refuse_writes(self) -> None:
        """A disk that takes no whole block."""
        process = psutil.Process(self._mesh.kvstores[0].popen.pid)
        before = process.rlimit(resource.RLIMIT_FSIZE)
        process.rlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        self._asker.ask_until("kv_verify_failures", reason="disk_write")
        process.rlimit(resource.RLIMIT_FSIZE, before)

    def _break_requests(self) -> None:
        """What the gateway would refuse, sent behind its back: a prefill and a rank fail at it."""
        mesh, asker = self._mesh, self._asker
        asker.ask(asker.request())
        gates = [mesh.gate("gateway", process) for process in mesh.prefills]
        sent = [message for gate in gates for message in gate.sent[PREFILL]][-1]
        broken, unfinished = (prefill_pb2.PrefillRequest.FromString(sent) for _ in range(2))
        broken.prompt_token_ids[-1] = BAD_TOKEN
        unfinished.ClearField("sequences")
        for prefill in (broken, unfinished):
            prefill.tail_key = asker.rng.randbytes(32)
            assert _failure(mesh.prefills[0], prefill) is grpc.StatusCode.INTERNAL
        admit = decode_pb2.SessionRequest()
        admit.CopyFrom(mesh.sent("admit")[-1])
        admit.admit.prompt_token_ids[-1] = BAD_TOKEN
        admit.admit.ClearField("handoff")
        assert _first_answer(mesh.decodes[0], admit).rejected

    def _kill(self) -> None:
        """A rank in mid-stream, a prefill in mid-prompt, the store."""
        mesh = self._mesh
        streams = [mesh.stream(self._asker.request(300)) for _ in range(4)]
        for stream in streams:
            stream.wait_tokens(20)
        self._lose(mesh.decodes[0], "decode", lambda: [self._asker.take(s) for s in streams])
        mesh.wait_moved("decode_tokens", disposition="recomputed")
        mesh.wait_moved("retries", phase="decode", reason=ERROR_REASON[0])
        with mesh.in_phase("prefill") as reach:
            stream = mesh.stream(self._asker.request())
            release = reach(stream)
            victim = next(p for p in mesh.prefills if mesh.status(p.address).counts.num_requests)
            self._lose(victim, "prefill", release)
            self._asker.take(stream)
        mesh.wait_moved("retries", phase="prefill", reason=ERROR_REASON[0])

    def _kill_store(self) -> None:
        """Everybody sees it go, and come back."""
        mesh = self._mesh
        kill(mesh.kvstores[0])
        for state in ("not_ready", "down"):
            mesh.wait_moved("peer_state", role="kvstore", state=state)
        revive(mesh, mesh.kvstores[0])
        self._asker.settle()

    def _lose(self, victim: Process, role: str, act: Callable[[], object]) -> None:
        kill(victim)
        act()
        self._mesh.wait_moved("peer_state", role=role, state="not_ready")
        revive(self._mesh, victim)
        self._asker.settle()

    def _starve(self) -> None:
        """A request for which there is no prefill."""
        with contextlib.ExitStack() as stack:
            for process in self._mesh.prefills:
                stack.enter_context(self._mesh.gate("gateway", process).cut())
            self._mesh.stream(self._asker.request()).failure()
        self._asker.settle()

    def _drop_exports(self) -> None:
        """A receiver that is gone."""
        self._mesh.wait_until(lambda: len(self._mesh.receiver.exports) > 50, "exports arrive", 30)
        self._mesh.receiver.close()
        self._asker.ask(self._asker.request())
        for signal in ("spans", "metrics"):
            self._mesh.wait_moved("telemetry_dropped", signal=signal)


def _misplaced(message: bytes) -> bytes:
    response = kvstore_pb2.LookupResponse.FromString(message)
    response.offsets[:] = [2**40] * len(response.offsets)
    return response.SerializeToString()


def _misdigested(message: bytes) -> bytes:
    response = kvstore_pb2.LookupResponse.FromString(message)
    response.digests[:] = [digest ^ 1 for digest in response.digests]
    return response.SerializeToString()


def _misnamed(message: bytes) -> bytes:
    response = prefill_pb2.PrefillResponse.FromString(message)
    kind = response.WhichOneof("event")
    if kind in ("closing", "finished"):
        getattr(response, kind).handoff.identity = bytes(32)
    return response.SerializeToString()


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def _failure(process: Process, prefill: prefill_pb2.PrefillRequest) -> grpc.StatusCode:
    """What a call of our own ends with."""
    with grpc.insecure_channel(process.address) as channel:
        call = channel.unary_stream(PREFILL)(prefill.SerializeToString(), timeout=30)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        return call.code()


def _first_answer(rank: Process, command: decode_pb2.SessionRequest) -> decode_pb2.SessionResponse:
    """What a rank says to a session of our own, that ends then."""
    over = threading.Event()

    def commands() -> Iterator[bytes]:
        yield command.SerializeToString()
        over.wait(30)

    with grpc.insecure_channel(rank.address) as channel:
        call = channel.stream_stream(SESSION)(commands(), timeout=30)
        answers = map(decode_pb2.SessionResponse.FromString, call)
        answer = next(one for one in answers if one.rejected or one.outputs)
        over.set()
        call.cancel()
    return answer
