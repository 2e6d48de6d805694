"""Where a request goes: the instances of the mesh, polled, and the choice among them.

Owns channels, polling and the decode sessions. Never pairs a prefill and a decode of different
fingerprints.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from mesh.channel import open_channel
from mesh.errors import Unavailable
from mesh.rendezvous import owner
from mesh.telemetry import Telemetry
from protos import status_pb2
from services.gateway.catalog import ServedModel, served_model
from services.gateway.instance import Instance
from services.gateway.session import RankSession

log = logging.getLogger("kvmesh.gateway")

POLL_TIMEOUT_S = 2.0
# A session keeps its instance unless that one is this much busier than the least busy, in tokens.
AFFINITY_TOKENS = 4096

T = TypeVar("T")


class Router:
    """Build, then `start`; `close` ends sessions and channels."""

    def __init__(
        self,
        *,
        model_name: str,
        prefills: Sequence[str],
        decodes: Sequence[str],
        telemetry: Telemetry,
        poll_s: float,
        lost_after_s: float,
        rank_wait_s: float,
    ) -> None:
        def make(role: status_pb2.Role, addresses: Sequence[str]) -> list[Instance]:
            return [self._make(role, address) for address in addresses]

        self._telemetry = telemetry
        self._model_name = model_name
        self._poll_s = poll_s
        self._lost_after_s = lost_after_s
        self._rank_wait_s = rank_wait_s
        self.prefills = make(status_pb2.ROLE_PREFILL, prefills)
        self.decodes = make(status_pb2.ROLE_DECODE, decodes)
        self.kvstores: list[Instance] = []
        self._sessions = [RankSession(rank, on_change=self.notify) for rank in self.decodes]
        self._model: ServedModel | None = None
        self._is_ready = False
        self._choices = itertools.count(1)
        self._changed = asyncio.Event()
        self._watches: dict[Instance, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def instances(self) -> list[Instance]:
        """Every polled process."""
        return [*self.prefills, *self.decodes, *self.kvstores]

    @property
    def is_ready(self) -> bool:
        """Whether a prefill and a reachable decode rank agree on a model now."""
        return self._is_ready

    @property
    def model(self) -> ServedModel:
        """The model new requests use; the last known one while workers restart."""
        if self._model is None:
            raise Unavailable(
                "no prefill and decode instance agree on a model yet",
                reason="NO_MODEL",
                retryable=True,
            )
        return self._model

    def peer_states(self) -> list[tuple[int, dict[str, str]]]:
        """How many instances there are, by role and whether they take work."""
        groups = (("prefill", self.prefills), ("decode", self.decodes), ("kvstore", self.kvstores))
        return [
            (sum(i.is_ready is is_ready for i in instances), {"role": role, "state": state})
            for role, instances in groups
            for is_ready, state in ((True, "ready"), (False, "not_ready"))
        ]

    async def start(self) -> None:
        """Opens sessions and begins polling."""
        for session in self._sessions:
            session.start()
        for instance in self.instances:
            self._watches[instance] = asyncio.ensure_future(self._watch(instance))

    async def close(self) -> None:
        """Stops polling, ends the sessions, closes the channels."""
        tasks = [*self._watches.values(), *self._leaving]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for session in self._sessions:
            await session.close()
        for instance in self.instances:
            await instance.channel.close()

    def follow_kvstores(self, addresses: Sequence[str]) -> None:
        """These are the kvstores from now on, in this order; after `start`."""
        known = {instance.address: instance for instance in self.kvstores}
        self.kvstores = [
            known.pop(address, None) or self._join_kvstore(address) for address in addresses
        ]
        for instance in known.values():
            task = asyncio.ensure_future(self._leave(instance, self._watches.pop(instance)))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        self.notify()

    def check(self, num_requests: int) -> None:
        """Asserts that sessions and instances hold the work of live requests only."""
        for session in self._sessions:
            held = session.num_requests
            assert held <= num_requests, f"{session.instance.address}: {held} requests on the rank"
        for instance in self.instances:
            held = instance.num_outstanding
            assert held >= 0 and (num_requests or not held), f"{instance.address}: {held} tokens"

    def notify(self) -> None:
        """Something about an instance changed: whoever waits for one looks again."""
        self._refresh()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self) -> None:
        """Waits for the next change."""
        await self._changed.wait()

    def report(self, instance: Instance, reason: str) -> None:
        """A call to this instance failed: it is left out until it answers a poll again."""
        instance.fail(reason)
        self.notify()

    async def prefill(self, session_id: str, avoid: Iterable[str]) -> tuple[Instance, bytes]:
        """Waits for a ready prefill; returns it and the fingerprint decode ranks share with it."""
        avoided = frozenset(avoid)

        def find() -> Instance | None:
            served = self._decode_fingerprints()
            ready = [p for p in self.prefills if p.model and p.model.fingerprint in served]
            preferred = [p for p in ready if p.model and p.model.fingerprint == self._fingerprint()]
            return self._choose(preferred or ready, session_id, avoided)

        instance = await self._wait_for(find, "prefill instance")
        assert instance.model is not None
        return instance, instance.model.fingerprint

    async def rank(self, fingerprint: bytes, session_id: str, avoid: Iterable[str]) -> RankSession:
        """Waits for a decode rank with this fingerprint and an open session."""
        avoided = frozenset(avoid)
        return await self._wait_for(
            lambda: self.rank_now(fingerprint, session_id, avoided),
            f"decode rank with fingerprint {fingerprint.hex()[:16]}",
        )

    def rank_now(
        self, fingerprint: bytes, session_id: str, avoid: frozenset[str] = frozenset()
    ) -> RankSession | None:
        """The rank that `rank` would return at once, if there is one."""
        ready = {
            session.instance.address: session
            for session in self._sessions
            if session.is_open
            and session.instance.model
            and session.instance.model.fingerprint == fingerprint
        }
        chosen = self._choose([s.instance for s in ready.values()], session_id, avoid)
        return ready[chosen.address] if chosen else None

    def _make(self, role: status_pb2.Role, address: str) -> Instance:
        return Instance(role, address, open_channel(address, self._telemetry))

    def _join_kvstore(self, address: str) -> Instance:
        instance = self._make(status_pb2.ROLE_KVSTORE, address)
        self._watches[instance] = asyncio.ensure_future(self._watch(instance))
        return instance

    async def _leave(self, instance: Instance, watch: asyncio.Task[None]) -> None:
        """Stops polling it; calls under way have POLL_TIMEOUT_S seconds to end."""
        watch.cancel()
        await asyncio.wait([watch])
        await instance.channel.close(POLL_TIMEOUT_S)
        log.info("%s left", instance.address)

    def _fingerprint(self) -> bytes:
        return self._model.fingerprint if self._model else b""

    def _decode_fingerprints(self) -> set[bytes]:
        return {rank.model.fingerprint for rank in self.decodes if rank.model}

    def _choose(
        self, ready: Sequence[Instance], session_id: str, avoid: frozenset[str]
    ) -> Instance | None:
        """The least loaded, the longest unused among equals; a session's own unless far busier."""
        candidates = [i for i in ready if i.address not in avoid] or list(ready)
        if not candidates:
            return None
        chosen = min(candidates, key=lambda i: (i.num_outstanding, i.chosen_at))
        if session_id:
            home = owner(session_id.encode(), [i.address for i in candidates])
            own = next(i for i in candidates if i.address == home)
            if own.num_outstanding <= chosen.num_outstanding + AFFINITY_TOKENS:
                chosen = own
        chosen.chosen_at = next(self._choices)
        return chosen

    async def _wait_for(self, find: Callable[[], T | None], what: str) -> T:
        try:
            async with asyncio.timeout(self._rank_wait_s):
                while (found := find()) is None:
                    await self.changed()
                return found
        except TimeoutError:
            raise Unavailable(
                f"no {what} became ready within {self._rank_wait_s:g} s",
                reason="NO_INSTANCE",
                retryable=True,
            ) from None

    async def _watch(self, instance: Instance) -> None:
        """Polls one instance for ever; one that stays silent too long is lost."""
        loop = asyncio.get_running_loop()
        lost_at = loop.time() + self._lost_after_s
        while True:
            before = (instance.is_ready, instance.model)
            patience_s = lost_at - loop.time()
            await instance.poll(patience_s if patience_s > 0 else POLL_TIMEOUT_S)
            after = (instance.is_ready, instance.model)
            if not instance.has_failed:
                lost_at = loop.time() + self._lost_after_s
            elif loop.time() >= lost_at:
                instance.lose(f"{instance.address} has not answered for {self._lost_after_s:g} s")
            if before != after:
                log.info("%s %s", instance.address, "ready" if instance.is_ready else "not ready")
                self.notify()
            await asyncio.sleep(self._poll_s)

    def _refresh(self) -> None:
        open_ranks = [s.instance.model for s in self._sessions if s.is_open and s.instance.model]
        prefills = [p.model for p in self.prefills if p.model]
        model = served_model(self._model_name, prefills, open_ranks)
        self._is_ready = model is not None
        if model is not None:
            self._model = model
