"""The store's protocol with one habit broken at a time: what the machine must find."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from services.kvstore.block import Leased, LeaseOutcome, Reserved
from services.kvstore.index import BlockIndex
from tests.services.kvstore.store_world import Habits


class LateSeal(BlockIndex):
    """Seals a reservation that has expired."""

    def reserve(
        self,
        owner: str,
        keys: Sequence[bytes],
        num_bytes: int,
        *,
        ttl_s: float,
        is_private: bool = False,
        **rest: Any,
    ) -> list[Reserved]:
        ttl_s *= 10
        return super().reserve(owner, keys, num_bytes, ttl_s=ttl_s, is_private=is_private, **rest)


class BlindEviction(BlockIndex):
    """Forgets a lease as soon as it has granted it."""

    def lookup(
        self, owner: str, keys: Sequence[bytes], num_bytes: int, *, ttl_s: float, attempt: int = 0
    ) -> Leased:
        leased = super().lookup(owner, keys, num_bytes, ttl_s=ttl_s, attempt=attempt)
        super().release(owner, leased.lease_id)
        return leased


class AlwaysHeld(BlockIndex):
    """Calls every lease of the caller held."""

    def release(self, owner: str, lease_id: int) -> LeaseOutcome:
        outcome = super().release(owner, lease_id)
        return outcome if owner == "another" else LeaseOutcome.HELD


class AnyOwner(BlockIndex):
    """Lets every caller acknowledge everything."""

    def acknowledge(self, owner: str, reservation_ids: Iterable[int]) -> int:
        owners = ["another", *(f"w{i}.{n}" for i in range(2) for n in range(5))]
        ids = list(reservation_ids)
        return sum(super(AnyOwner, self).acknowledge(each, ids) for each in owners)


class LoosePins(BlockIndex):
    """Forgets a pin as soon as it is made."""

    def pin(self, owner: str, keys: Sequence[bytes], *, ttl_s: float) -> tuple[int, int]:
        num_pinned, pin_id = super().pin(owner, keys, ttl_s=ttl_s)
        super().unpin(owner, pin_id)
        return num_pinned, pin_id


class EndlessPins(BlockIndex):
    """Keeps pins for longer than they were asked for."""

    def pin(self, owner: str, keys: Sequence[bytes], *, ttl_s: float) -> tuple[int, int]:
        return super().pin(owner, keys, ttl_s=10 * ttl_s)


class NoQuota(BlockIndex):
    """Gives a tenant all it asks for."""

    def __init__(self, *args: Any, tenant_num_bytes: int, **options: Any) -> None:
        super().__init__(*args, **options)


class Silence(BlockIndex):
    """Tells no watcher of anything."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.journal.record = lambda words, before, after: None  # type: ignore[method-assign]


MUTANTS = {
    "quarantine skipped": (Habits(quarantine_s=0.0), "two hands: two writers'|was kept"),
    "quarantine never ends": (Habits(quarantine_s=1e9), "slots leak"),
    "ids begin again after a restart": (
        Habits(ids_per_life=0),
        "an id of another life|Release said HELD",
    ),
    "an expired reservation is sealed": (Habits(index_type=LateSeal), "that had ended was sealed"),
    "a lease does not stop eviction": (
        Habits(index_type=BlindEviction),
        "a reader's and a writer|was live: True",
    ),
    "an expired lease is called held": (Habits(index_type=AlwaysHeld), "Release said HELD"),
    "another owner acknowledges": (Habits(index_type=AnyOwner), "another's slot was freed"),
    "a reader does not confirm": (Habits(confirms=False), "is not what was sealed"),
    "a reader does not verify": (Habits(verifies=False), "a reader used bytes"),
    "a slot is given back during its WRITE": (Habits(waits=False), "a slot was overwritten"),
    "a block is sealed during its WRITE": (Habits(finishes=False), "sealed unwritten"),
    "a pin does not stop eviction": (
        Habits(index_type=LoosePins, pins=True),
        "evicted|at another time",
    ),
    "a pin outlives its deadline": (Habits(index_type=EndlessPins, pins=True), "at another time"),
    "a quota is not kept": (Habits(index_type=NoQuota), "over its quota"),
    "changes are not told": (Habits(index_type=Silence), "a watcher knows other keys"),
}
