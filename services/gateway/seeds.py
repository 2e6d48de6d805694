"""Seeds of a request's sequences. Owns the one function that derives them."""

from __future__ import annotations

import hashlib


def sequence_seed(seed: int, index: int) -> int:
    """The 64-bit seed of sequence `index`: the request's own for 0, a hash of both for the others."""
    if index == 0:
        return seed
    data = seed.to_bytes(8, "little") + index.to_bytes(4, "little")
    digest = hashlib.blake2b(data, digest_size=8, person=b"kvmesh-sequence").digest()
    return int.from_bytes(digest, "little")
