"""What a watcher is told follows from the store's changes, however far behind it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from services.kvstore.disk_format import file_num_bytes
from services.kvstore.feed import ChangeKind, Feed, News, NewsKind
from services.kvstore.journal import Journal
from services.kvstore.tiers import Promoted
from tests.services.kvstore.small_store import SIZE, Store
from tests.services.kvstore.watched_world import Follower


def messages(feed: Feed) -> list[News]:
    return list(iter(feed.next, None))


def kinds(feed: Feed) -> list[str]:
    return [news.kind.name for news in messages(feed)]


def told(feed: Feed) -> list[tuple[str, str, bytes]]:
    return [
        (change.kind.name, change.place.name, b"".join(key.rstrip(b"\0") for key in change.keys))
        for news in messages(feed)
        for change in news.changes
    ]


def test_private_and_unsealed_blocks_never_appear() -> None:
    store = Store()
    feed = store.index.feed()
    store.put("p", private=True)
    store.reserve("a")
    assert told(feed) == []
    store.index.discard([b"p"])
    assert told(feed) == []
    assert store.index.journal.next_sequence == 1


def test_a_block_in_memory_and_on_disk_is_evicted_once() -> None:
    store = Store(disk_num_bytes=file_num_bytes(SIZE))
    feed = store.index.feed()
    store.put("a")
    move = store.disk.next_demotion()
    assert move is not None
    store.disk.demoted(move, is_written=True)
    assert told(feed) == [("SEALED", "MEMORY", b"a")]
    store.index.evict(1)
    assert told(feed) == [("MOVED", "DISK", b"a")]
    assert told(store.index.feed()) == [("SEALED", "DISK", b"a")]
    ((move,), _) = store.promote("a")
    store.index.lower.promoted(move, Promoted.DONE)
    store.index.lower.settle(move)
    assert told(feed) == [("MOVED", "MEMORY", b"a")]
    store.index.drop_corrupt([b"a"])
    assert told(feed) == [("EVICTED", "MEMORY", b"a")]


def test_a_block_is_where_its_fastest_copy_is() -> None:
    store = Store(host_num_bytes=SIZE, disk_num_bytes=2 * file_num_bytes(SIZE))
    feed = store.index.feed()
    store.put("a")
    store.demote()
    assert told(feed) == [("SEALED", "MEMORY", b"a")]
    store.index.evict(1)
    assert told(feed) == [("MOVED", "HOST", b"a")]
    store.put("b")
    store.demote()
    assert told(feed) == [("SEALED", "MEMORY", b"b"), ("MOVED", "DISK", b"a")]
    store.index.evict(1)
    assert told(feed) == [("MOVED", "HOST", b"b")]
    store.index.drop_corrupt([b"a", b"b"])
    assert told(feed) == [("EVICTED", "DISK", b"a"), ("EVICTED", "HOST", b"b")], "once each"


def test_a_dropped_block_is_gone_before_its_last_reader() -> None:
    store = Store()
    store.put("a")
    feed = store.index.feed()
    messages(feed)
    lease_id, _ = store.lookup("a")
    store.index.drop_corrupt([b"a"])
    assert told(feed)[-1] == ("EVICTED", "MEMORY", b"a")
    store.release(lease_id)
    assert told(feed) == []


def test_runs_of_the_same_change_are_one_change_with_the_first_number() -> None:
    store = Store(num_slots=8)
    feed = store.index.feed()
    assert kinds(feed) == ["RESET", "CURRENT"]
    store.put("abc")
    store.index.evict(2)
    store.put("d")
    (news,) = messages(feed)
    assert [(c.kind, c.sequence, len(c.keys)) for c in news.changes] == [
        (ChangeKind.SEALED, 1, 3), (ChangeKind.EVICTED, 4, 2), (ChangeKind.SEALED, 6, 1)
    ]  # fmt: skip
    assert news.next_sequence == 7


def test_a_feed_that_is_overtaken_begins_anew() -> None:
    store = Store(num_slots=8, num_changes=4)
    feed = store.index.feed()
    messages(feed)
    store.put("abcd")
    assert kinds(feed) == ["CHANGES"], "all that the ring holds"
    store.put("efgh")
    store.index.evict(1)
    assert kinds(feed) == ["RESET", "SNAPSHOT", "CURRENT"]


def test_changes_during_a_snapshot_make_it_exact() -> None:
    store = Store(num_slots=8)
    store.put("abcd")
    follower = Follower()
    follower.begin(store.index, "life")
    for _ in range(2):  # a reset, and the first piece
        follower.step()
    store.index.drop_corrupt([b"a", b"d"])
    store.put("d")
    store.put("xa")
    assert follower.catch_up() == {b"a", b"b", b"c", b"d", b"x"}
    at = follower.kinds.index(NewsKind.CURRENT)
    assert NewsKind.CHANGES in follower.kinds[:at], "it was called current too early"


def test_the_journal_forgets_the_oldest_and_wakes_sleepers_once() -> None:
    journal = Journal(2)
    words: Any = memoryview(np.frombuffer(b"k" * 32, np.uint64))  # type: ignore[arg-type]
    woken: list[int] = []
    journal.sleepers.add(lambda: woken.append(journal.next_sequence))
    for before in range(3):
        journal.record(words, before, (before + 1) % 3)
    assert (journal.first_sequence, journal.next_sequence, woken) == (2, 4, [2])
    keys, before, after = journal.read(2, 9)
    assert keys == [b"k" * 32] * 2
    assert (before.tolist(), after.tolist()) == ([1, 2], [2, 0])
    with pytest.raises(ValueError, match="0 changes"):
        Journal(0)
