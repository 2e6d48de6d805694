"""What a watcher makes of the messages of a store, right and wrong ones."""

from __future__ import annotations

import pytest

from mesh.kvstore_watch import Gap, KnownKeys
from protos import kvstore_pb2 as pb

KEY_A, KEY_B, KEY_C = (letter * 32 for letter in (b"a", b"b", b"c"))
SEALED, EVICTED, MOVED = pb.Change.KIND_SEALED, pb.Change.KIND_EVICTED, pb.Change.KIND_MOVED
MEMORY, DISK = pb.TIER_MEMORY, pb.TIER_DISK


def message(
    kind: pb.WatchResponse.Kind, next_sequence: int, *changes: pb.Change, life: str = "one"
) -> pb.WatchResponse:
    return pb.WatchResponse(kind=kind, life=life, next_sequence=next_sequence, changes=changes)


def reset(next_sequence: int, life: str = "one") -> pb.WatchResponse:
    return message(pb.WatchResponse.KIND_RESET, next_sequence, life=life)


def snapshot(next_sequence: int, *keys: bytes) -> pb.WatchResponse:
    change = pb.Change(kind=SEALED, tier=MEMORY, keys=keys)
    return message(pb.WatchResponse.KIND_SNAPSHOT, next_sequence, change)


def changes(sequence: int, kind: pb.Change.Kind, tier: pb.Tier, *keys: bytes) -> pb.WatchResponse:
    change = pb.Change(sequence=sequence, kind=kind, tier=tier, keys=keys)
    return message(pb.WatchResponse.KIND_CHANGES, sequence + len(keys), change)


def current(next_sequence: int, life: str = "one") -> pb.WatchResponse:
    return message(pb.WatchResponse.KIND_CURRENT, next_sequence, life=life)


def told(*messages: pb.WatchResponse) -> KnownKeys:
    known = KnownKeys()
    for each in messages:
        known.apply(each)
    return known


def test_a_snapshot_counts_when_it_is_whole() -> None:
    known = told(reset(5), snapshot(5, KEY_A), changes(5, EVICTED, MEMORY, KEY_A))
    assert not set(known) and not known.is_current
    known.apply(changes(6, SEALED, MEMORY, KEY_B, KEY_C))
    known.apply(current(8))
    assert set(known) == {KEY_B, KEY_C} and known.is_current and known.next_sequence == 8


def test_the_old_keys_stay_until_the_new_ones_are_whole() -> None:
    known = told(reset(1), snapshot(1, KEY_A), current(1), reset(9), snapshot(9, KEY_B))
    assert set(known) == {KEY_A} and not known.is_current
    known.apply(current(9))
    assert set(known) == {KEY_B}


def test_a_block_that_moves_is_known_in_its_new_tier() -> None:
    known = told(reset(1), current(1), changes(1, SEALED, MEMORY, KEY_A))
    assert known.tier_of(KEY_A) == MEMORY and KEY_A in known
    known.apply(changes(2, MOVED, DISK, KEY_A))
    assert known.tier_of(KEY_A) == DISK and len(known) == 1
    assert known.tier_of(KEY_B) == pb.TIER_UNSPECIFIED


def test_a_broken_stream_goes_on_where_it_was() -> None:
    known = told(reset(1), current(1), changes(1, SEALED, MEMORY, KEY_A))
    request = known.begin()
    assert (request.life, request.from_sequence) == ("one", 2) and not known.is_current
    known.apply(current(2))
    assert known.is_current and set(known) == {KEY_A}


def test_a_stream_that_broke_in_a_snapshot_begins_anew() -> None:
    known = told(reset(1), snapshot(1, KEY_A))
    assert known.begin().life == ""


@pytest.mark.parametrize(
    "wrong",
    [
        changes(3, SEALED, MEMORY, KEY_B),
        changes(1, SEALED, MEMORY, KEY_B),
        current(3),
        current(2, life="two"),
    ],
    ids=["a lost change", "a repeated change", "a lost message", "another life"],
)
def test_a_message_that_does_not_follow_is_a_gap(wrong: pb.WatchResponse) -> None:
    known = told(reset(1), current(1), changes(1, SEALED, MEMORY, KEY_A))
    with pytest.raises(Gap):
        known.apply(wrong)
    known.lose()
    assert known.begin().life == "" and set(known) >= {KEY_A}
