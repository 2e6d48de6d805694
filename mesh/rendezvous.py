"""Which member owns a key: rendezvous hashing. Owns the choice; knows nothing of who is alive."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def owner(key: bytes, members: Sequence[str]) -> str:
    """The member with the highest blake2b(key, member).

    A change of members moves only the keys of who came or went. Equal for every order of members
    and on every host. ValueError: no members.
    """
    if not members:
        raise ValueError("members: none; at least one")
    if len(members) == 1:
        return members[0]
    return max(members, key=lambda member: (_weight(key, member), member))


def _weight(key: bytes, member: str) -> bytes:
    return hashlib.blake2b(member.encode() + b"\0" + key, digest_size=8).digest()
