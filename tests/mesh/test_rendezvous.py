"""Ownership of keys is even, order-free, and moves only what it must."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from mesh.rendezvous import owner

KEYS = [hashlib.sha256(str(i).encode()).digest() for i in range(2000)]
MEMBERS = ["10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000"]


def test_every_member_owns_its_share_in_any_order() -> None:
    owners = [owner(key, MEMBERS) for key in KEYS]
    assert owners == [owner(key, MEMBERS[::-1]) for key in KEYS]
    assert all(550 < num < 800 for num in Counter(owners).values())


def test_losing_a_member_moves_only_its_keys() -> None:
    for key in KEYS:
        before, after = owner(key, MEMBERS), owner(key, MEMBERS[1:])
        assert before == MEMBERS[0] or before == after


def test_owners_never_change_between_versions() -> None:
    assert [MEMBERS.index(owner(key, MEMBERS)) for key in KEYS[:8]] == [1, 2, 1, 2, 0, 2, 2, 2]


def test_nobody_can_own_nothing() -> None:
    with pytest.raises(ValueError, match="members"):
        owner(KEYS[0], [])
