"""Seeds of a request's sequences.

Owns the one function that derives them; never draws one.
"""

from __future__ import annotations

import hashlib


def sequence_seed(seed: int, index: int) -> int:
    """The 64-bit seed of a sequence: the request's own for index 0, else a hash of both."""
    if index == 0:
        return seed
    data = seed.to_bytes(8, "little") + index.to_bytes(4, "little")
    digest = hashlib.blake2b(data, digest_size=8, person=b"kvmesh-sequence").digest()
    return int.from_bytes(digest, "little")
