"""A small store over real gRPC and a client of it, for tests of the store client."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from mesh.errors import FailedPrecondition, Unavailable
from mesh.folds import Folds
from mesh.kvstore_agent import agent_to_wire
from mesh.kvstore_client import KvStoreClient, PullResult
from mesh.server import ServiceServer
from mesh.telemetry import Telemetry
from protos import kvstore_pb2, kvstore_pb2_grpc
from tests.mesh.fake_transfer import BLOCK, CopyTransfer, Network, Settled

NUM_BLOCKS = 64
PATIENCE_S = 20.0


class Store(kvstore_pb2_grpc.KvStoreServiceServicer):
    """As much of a store as the client can tell apart."""

    def __init__(self, transfer: Any, capacity: int = NUM_BLOCKS) -> None:
        self.transfer = transfer
        self.capacity = capacity
        self.connected: set[str] = set()
        self.sealed: dict[bytes, tuple[int, int]] = {}
        self.private: set[bytes] = set()
        self.reserved: dict[int, tuple[bytes, int, bool]] = {}
        self.attempts: dict[int, list[int]] = {}  # what each got, reservations and leases
        self.given_up: set[int] = set()
        self.leases: dict[int, list[bytes]] = {}
        self.corrupt: list[bytes] = []
        self.num_keys_asked: list[int] = []
        self.tenants: list[str] = []
        self.num_leases = 0
        self.expires = False
        self.loses_answers = False
        self.is_deaf = False  # to what is given back
        self.told: list[tuple[int, int]] = []  # how many ids and attempts each time
        self.refusals: list[str] = []  # what of another life was asked for here
        self.gate: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self.acknowledged = asyncio.Event()
        self._next = 1
        self._free = list(range(NUM_BLOCKS))

    def hide_slots(self, num_slots: int) -> None:
        """Never grants those that would come first."""
        del self._free[-num_slots:]

    async def Connect(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.connected.add(request.agent.incarnation)
        return kvstore_pb2.ConnectResponse(agent=agent_to_wire(self.transfer.agent))

    async def Reserve(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._enter(request)
        self.tenants.append(request.tenant)
        answer = kvstore_pb2.ReserveResponse()
        taken = {key for key, _, _ in self.reserved.values()}
        for key in request.keys:
            outcome = kvstore_pb2.Reservation
            if key in self.sealed:
                answer.reservations.add(outcome=outcome.OUTCOME_ALREADY_SEALED)
            elif key in taken:
                answer.reservations.add(outcome=outcome.OUTCOME_ALREADY_RESERVED)
            elif self._is_full(request):
                answer.reservations.add(outcome=outcome.OUTCOME_FULL)
            else:
                slot, self._next = self._free.pop(), self._next + 1
                self.reserved[self._next] = (key, slot, request.is_private)
                self.attempts.setdefault(request.attempt, []).append(self._next)
                answer.reservations.add(
                    outcome=outcome.OUTCOME_RESERVED,
                    reservation_id=self._next,
                    slot=kvstore_pb2.Slot(offset=slot * BLOCK, num_bytes=request.num_bytes),
                )
        self._lose()
        return answer

    async def Seal(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._enter(request)
        answer = kvstore_pb2.SealResponse()
        for reservation_id, digest in zip(request.reservation_ids, request.digests, strict=True):
            is_known = self._is_own("Seal", request.life) and not self.expires
            entry = self.reserved.pop(reservation_id, None) if is_known else None
            answer.sealed.append(entry is not None)
            if entry is not None:
                self.sealed[entry[0]] = (entry[1], digest)
                if entry[2]:
                    self.private.add(entry[0])
        return answer

    async def Acknowledge(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.told.append((len(request.reservation_ids), len(request.attempts)))
        if self.is_deaf:
            raise Unavailable("deaf")
        ids = [n for attempt in request.attempts for n in self.attempts.pop(attempt, [])]
        self.given_up.update(request.attempts)
        if request.reservation_ids and self._is_own("Acknowledge", request.life):
            ids += request.reservation_ids
        for lent in [self.leases.pop(n) for n in ids if n in self.leases]:
            self._drop([key for key in lent if key in self.private])
        freed = [self.reserved.pop(n) for n in ids if n in self.reserved]
        self._free += [slot for _, slot, _ in freed]
        self.acknowledged.set()
        return kvstore_pb2.AcknowledgeResponse(num_freed=len(freed))

    async def Lookup(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.num_keys_asked.append(len(request.keys))
        await self._enter(request)
        found: list[bytes] = []
        for key in request.keys:
            if key not in self.sealed or request.attempt in self.given_up:
                break
            found.append(key)
        if not found:
            return kvstore_pb2.LookupResponse()
        self._next += 1
        self.num_leases += 1
        self.leases[self._next] = found
        self.attempts[request.attempt] = [self._next]
        self._lose()
        return kvstore_pb2.LookupResponse(
            lease_id=self._next,
            offsets=[self.sealed[key][0] * BLOCK for key in found],
            digests=[self.sealed[key][1] for key in found],
            num_bytes=BLOCK,
        )

    async def Release(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.is_deaf:
            raise Unavailable("deaf")
        self.corrupt += request.corrupt_keys
        is_known = request.lease_id and self._is_own("Release", request.life)
        lent = self.leases.pop(request.lease_id, None) if is_known else None
        self._drop([*request.corrupt_keys, *(k for k in lent or () if k in self.private)])
        outcome = kvstore_pb2.ReleaseResponse
        held = lent is not None and not self.expires
        return outcome(outcome=outcome.OUTCOME_HELD if held else outcome.OUTCOME_EXPIRED)

    async def Discard(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._drop([key for key in request.keys if key in self.private])
        return kvstore_pb2.DiscardResponse()

    def _drop(self, keys: list[bytes]) -> None:
        for key in keys:
            if key in self.sealed:
                self._free.append(self.sealed.pop(key)[0])
                self.private.discard(key)

    def _is_full(self, request: Any) -> bool:
        is_full = len(self.sealed) + len(self.reserved) >= self.capacity
        return is_full or request.attempt in self.given_up

    def _is_own(self, method: str, life: str) -> bool:
        """Whether ids of that life are ours; equal ones may be of others."""
        if life != self.transfer.agent.name:
            self.refusals.append(method)
        return life == self.transfer.agent.name

    def _lose(self) -> None:
        if self.loses_answers:
            raise Unavailable("the answer is lost")

    async def _enter(self, request: Any) -> None:
        if request.incarnation not in self.connected:
            raise FailedPrecondition("who are you", reason="UNKNOWN_INCARNATION")
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()


class Mesh:
    """A client of some stores, and what it told us."""

    def __init__(self) -> None:
        self.network = Network()
        self.worker: Any = CopyTransfer(self.network, "worker", NUM_BLOCKS)
        self.stores: list[Store] = []
        self.held: list[tuple[list[int], Settled]] = []
        self.reader = InMemoryMetricReader()
        meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.telemetry = Telemetry(None, meters.get_meter("test"), Folds())
        self._servers: dict[str, ServiceServer] = {}
        self._clients: list[KvStoreClient] = []

    async def serve(self, store: Store, port: int = 0) -> str:
        quiet = Telemetry.off()
        server = ServiceServer(host="127.0.0.1", port=port, telemetry=quiet)
        register = kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server
        server.add(register, store, "kvmesh.v1.KvStoreService")
        address = f"127.0.0.1:{await server.start()}"
        self._servers[address] = server
        self.stores.append(store)
        return address

    async def stop(self, address: str) -> None:
        await self._servers.pop(address).stop(0)

    async def client(self, *addresses: str) -> KvStoreClient:
        client = KvStoreClient(
            transfer=self.worker,
            block_num_bytes=BLOCK,
            incarnation=self.worker.agent.incarnation,
            digest=self.digest,
            telemetry=self.telemetry,
        )
        client.follow(addresses)
        await client.start()
        self._clients.append(client)
        return client

    async def started(self, num_stores: int = 1, **kwargs: Any) -> KvStoreClient:
        addresses = [
            await self.serve(Store(CopyTransfer(self.network, f"store-{i}", NUM_BLOCKS), **kwargs))
            for i in range(num_stores)
        ]
        client = await self.client(*addresses)
        assert await client.until_up(PATIENCE_S)
        return client

    async def digest(self, block_ids: list[int]) -> list[int]:
        return [digest_of(self.block(block_id)) for block_id in block_ids]

    def block(self, block_id: int) -> np.ndarray[Any, Any]:
        return self.worker.arena[block_id * BLOCK : (block_id + 1) * BLOCK]

    def fill(self, num: int) -> bytes:
        """Random bytes into blocks 0..num; returns them and clears nothing."""
        data = np.random.default_rng(num).integers(0, 256, num * BLOCK, np.uint8)
        self.worker.arena[: num * BLOCK] = data
        return data.tobytes()

    def hold(self, block_ids: list[int], settled: Settled) -> None:
        self.held.append((block_ids, settled))

    async def pull(self, client: KvStoreClient, keys: list[bytes], first: int = 32) -> PullResult:
        """Pulls into blocks first, first + 1, ..."""
        blocks = list(range(first, first + len(keys)))
        return await client.pull(keys, blocks, deadline_s=PATIENCE_S, hold=self.hold)

    def count(self, name: str) -> dict[str, float]:
        """Sum of a counter by its one attribute."""
        totals: dict[str, float] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
                if metric.name == name:
                    for point in metric.data.data_points:
                        (label,) = (point.attributes or {}).values()
                        value = getattr(point, "value", None) or getattr(point, "sum", 0)
                        totals[str(label)] = totals.get(str(label), 0) + value
        return totals

    async def close(self) -> None:
        """Closing the clients also waits for their releases and acknowledgements."""
        for settled in self.network.late:
            if not settled.done():
                settled.set_result(None)
        for client in self._clients:
            await client.close()
        self._clients = []
        for address in list(self._servers):
            await self.stop(address)
        assert all(not store.leases and not store.reserved for store in self.stores)


def digest_of(data: np.ndarray[Any, Any]) -> int:
    return int.from_bytes(hashlib.blake2b(data.tobytes(), digest_size=8).digest(), "little")


def keys_of(num: int) -> list[bytes]:
    return [hashlib.sha256(str(i).encode()).digest() for i in range(num)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - for what a client tells nobody of
            await asyncio.sleep(0.005)


async def publish(client: KvStoreClient, keys: list[bytes], **kwargs: Any) -> int:
    return await client.put(keys, list(range(len(keys))), deadline_s=PATIENCE_S, **kwargs)
