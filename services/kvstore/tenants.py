"""Tenants: how many bytes of the arena the blocks of each take, and how many they may.

Owns the counts. A tenant is a number made from its name, so that no name need be remembered: there
are counts only for tenants that have blocks in memory.
"""

from __future__ import annotations

import hashlib

SHARED = 0  # the tenant of all who name none
_NUM_BYTES = 7  # of a number: it fits a signed column


def tenant_number(name: str) -> int:
    """The number of a tenant, the same every time; SHARED for the empty name."""
    if not name:
        return SHARED
    digest = hashlib.blake2b(name.encode(), digest_size=_NUM_BYTES).digest()
    return 1 + int.from_bytes(digest, "little")


class Tenants:
    """Bytes by tenant. `limit` holds for each of them; 0 is no limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_bytes: dict[int, int] = {}

    def add(self, tenant: int, num_bytes: int) -> None:
        """A tenant's block takes a slot."""
        self.num_bytes[tenant] = self.num_bytes.get(tenant, 0) + num_bytes

    def remove(self, tenant: int, num_bytes: int) -> None:
        """It gives it back."""
        rest = self.num_bytes[tenant] - num_bytes
        if rest:
            self.num_bytes[tenant] = rest
        else:
            del self.num_bytes[tenant]

    def is_over(self, tenant: int, num_bytes: int) -> bool:
        """Whether num_bytes more are too many; without a limit they never are."""
        return bool(self.limit) and self.num_bytes.get(tenant, 0) + num_bytes > self.limit
