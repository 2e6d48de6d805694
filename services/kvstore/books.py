"""The audit of the block index, and its numbers.

Owns the statement of what must always hold between its books; never changes them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from services.kvstore.block import BlockState, CopyState, IndexCounts, Place
from services.kvstore.blocks import Blocks
from services.kvstore.expiry import Deadlines, Due
from services.kvstore.leases import Leases
from services.kvstore.memory import MemoryTier
from services.kvstore.pins import Pins
from services.kvstore.reservations import Reservations
from services.kvstore.rows import RowArray
from services.kvstore.tiers import LowerTiers


def check_books(
    *,
    blocks: Blocks,
    memory: MemoryTier,
    reservations: Reservations,
    leases: Leases,
    pins: Pins,
    moving: RowArray,
    deadlines: Deadlines,
    used_offsets: set[int],
) -> None:
    """Asserts one owner per slot, states that match their books, deadlines for all promises."""
    state, named = blocks.state.values, set(blocks.named().tolist())
    has_slot = np.flatnonzero(state != BlockState.ABSENT)
    quarantined = [claim.offset for claim in reservations.quarantined.values()]
    offsets = [*blocks.offset.values[has_slot].tolist(), *quarantined]
    assert len(set(offsets)) == len(offsets), "a slot is owned twice"
    assert set(offsets) == used_offsets, "a slot is leaked or used after it was freed"
    in_index = has_slot[state[has_slot] != BlockState.DROPPED]
    dropped = has_slot[state[has_slot] == BlockState.DROPPED]
    assert set(in_index.tolist()) <= named, "a block with a slot has no name"
    assert not set(dropped.tolist()) & named, "a dropped block has a name"
    for row in named:
        assert blocks.has_place(row) or blocks.is_parent(row), "a row was not let go"
    memory.leaves.check(in_index)
    memory.check()
    pins.check()
    _check_places(blocks)
    claimed = {claim.row: claim.offset for claim in reservations.live.values()}
    rows = np.flatnonzero(state == BlockState.RESERVED).tolist()
    assert claimed == {row: blocks.offset.at[row] for row in rows}, "claims and rows disagree"
    holders = [*leases.live.values(), *leases.uses]
    _check_holds(blocks, [*(holder.rows for holder in holders), moving])
    assert deadlines.live(Due.RESERVATION) == set(reservations.live)
    assert deadlines.live(Due.QUARANTINE) == set(reservations.quarantined)
    assert deadlines.live(Due.LEASE) == set(leases.live)
    assert deadlines.live(Due.PIN) == set(pins.live)
    private = np.flatnonzero(blocks.is_private.values & (state == BlockState.SEALED))
    sealed_by = blocks.reservation_id.values[private].tolist()
    assert deadlines.live(Due.PRIVATE) == set(sealed_by)


def count_books(
    *,
    blocks: Blocks,
    memory: MemoryTier,
    deadlines: Deadlines,
    lower: LowerTiers,
    reservations: Reservations,
    leases: Leases,
    pins: Pins,
) -> IndexCounts:
    """How much is in the books."""
    host, disk = lower.host, lower.disk
    num_by_state = np.bincount(blocks.state.values, minlength=len(BlockState)).tolist()
    return IndexCounts(
        num_sealed=num_by_state[BlockState.SEALED],
        num_reserved=num_by_state[BlockState.RESERVED],
        num_private=int(np.count_nonzero(blocks.is_private.values)),
        num_quarantined=len(reservations.quarantined),
        num_dropped=num_by_state[BlockState.DROPPED],
        num_leases=len(leases.live),
        num_pins=len(pins.live),
        pinned_num_bytes=pins.num_bytes,
        num_promoting=num_by_state[BlockState.PROMOTING],
        num_in_host=host.num_blocks if host else 0,
        num_on_disk=disk.num_blocks if disk else 0,
        host_num_bytes=host.num_bytes if host else 0,
        disk_num_bytes=disk.num_bytes if disk else 0,
        num_evicted=memory.num_evicted,
        num_expired={
            due.name.lower(): deadlines.num_due[due]
            for due in (Due.LEASE, Due.RESERVATION, Due.PIN)
        },
    )


def _check_holds(blocks: Blocks, holders: Iterable[RowArray]) -> None:
    num_holds = np.zeros_like(blocks.num_holds.values)
    for rows in holders:
        np.add.at(num_holds, rows, 1)
    assert (num_holds == blocks.num_holds.values).all(), (
        "holds are not those of leases, uses and moves"
    )
    held = blocks.state.values[num_holds > 0]
    assert np.isin(held, (BlockState.SEALED, BlockState.DROPPED)).all(), "an unsealed block is held"
    is_dropped = blocks.state.values == BlockState.DROPPED
    assert (num_holds[is_dropped] > 0).all(), "a dropped block is kept for nobody"


def _check_places(blocks: Blocks) -> None:
    """What was told of every row is so."""
    blocks.journal.check()
    is_public = ~blocks.is_private.values
    in_memory = (blocks.state.values == BlockState.SEALED) & is_public
    places = np.zeros_like(blocks.place.values)
    for place, column in reversed(blocks.lower):
        places[column.values == CopyState.PRESENT] = place
    places[in_memory] = Place.MEMORY
    assert (blocks.place.values == places).all(), "told wrong of where a block is"
