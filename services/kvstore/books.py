"""The audit of the block index.

Owns the statement of what must always hold between its books; never changes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.kvstore.block import Block, BlockState, Lease
from services.kvstore.expiry import Deadlines, Due


def check_books(
    *,
    blocks: Mapping[bytes, Block],
    reserved: Mapping[int, Block],
    sealed: Mapping[int, Block],
    quarantined: Mapping[int, Block],
    dropped: Iterable[Block],
    leases: Mapping[int, Lease],
    deadlines: Deadlines,
    used_offsets: set[int],
) -> None:
    """Asserts one owner per slot, states that match their books, deadlines for all promises."""
    holders = [*blocks.values(), *quarantined.values(), *dropped]
    offsets = {block.offset for block in holders}
    assert len(offsets) == len(holders), "a slot is owned twice"
    assert offsets == used_offsets, "a slot is leaked or used after it was freed"
    assert all(key == block.key for key, block in blocks.items())
    for state, book in ((BlockState.RESERVED, reserved), (BlockState.SEALED, sealed)):
        in_state = {b.reservation_id: b for b in blocks.values() if b.state is state}
        assert in_state == book, f"{state} blocks and their ids disagree"
    assert len(reserved) + len(sealed) == len(blocks), "the index holds blocks of another state"
    assert all(b.state is BlockState.QUARANTINED for b in quarantined.values())
    assert all(b.state is BlockState.DROPPED and b.num_leases for b in dropped)
    num_leases: dict[int, int] = {}
    for block in (block for lease in leases.values() for block in lease.blocks):
        num_leases[id(block)] = num_leases.get(id(block), 0) + 1
    counted = {id(block): block.num_leases for block in holders if block.num_leases}
    assert num_leases == counted, "lease counts differ from the leases"
    assert deadlines.live(Due.RESERVATION) == set(reserved)
    assert deadlines.live(Due.QUARANTINE) == set(quarantined)
    assert deadlines.live(Due.LEASE) == set(leases)
    assert deadlines.live(Due.PRIVATE) == {i for i, b in sealed.items() if b.is_private}
