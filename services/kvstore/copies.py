"""What a lower tier's threads call: copies of blocks, and of bytes, each until it is done.

Owns the words in which they fail. Everything here blocks and belongs into a thread; nothing here
knows the books. What a move names is the caller's alone until the call has returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from services.kvstore.lower_tier import Move


class UnusableBlock(Exception):
    """A tier does not have the block that it should; `reason` is one of a few words."""

    def __init__(self, where: object, reason: str, detail: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.reason = reason


class CopyFailed(Exception):
    """A tier takes no blocks now; `reason` is one of a few words."""

    def __init__(self, where: object, reason: str, detail: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.reason = reason


class Copies(Protocol):
    """One tier's copies of blocks."""

    def read(self, moves: Sequence[Move]) -> None:
        """Fills the slots of blocks; after an UnusableBlock none of them is to be used."""
        ...

    def write(self, moves: Sequence[Move]) -> None:
        """Copies blocks from their slots; after a CopyFailed none has a copy."""
        ...

    def remove(self, key: bytes) -> None:
        """Removes a block's copy."""
        ...

    def close(self) -> None:
        """Lets go of everything; no thread calls any more."""
        ...


class Span(NamedTuple):
    """Bytes of the arena, from an offset, and as many of host memory, from an address."""

    offset: int
    address: int
    num_bytes: int


class CopyEngine(Protocol):
    """Copies bytes between an arena and host memory, from any thread. RuntimeError."""

    def read(self, spans: Sequence[Span]) -> None:
        """From the arena; returns when all have come."""
        ...

    def write(self, spans: Sequence[Span]) -> None:
        """Into the arena; returns when all have arrived."""
        ...

    def pin(self, memory: NDArray[np.uint8]) -> None:
        """Makes copies from and to this memory faster, until `unpin`."""
        ...

    def unpin(self, memory: NDArray[np.uint8]) -> None:
        """Ends it; before the memory goes."""
        ...


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same bytes in fewer spans: neighbours on both sides become one."""
    runs: list[Span] = []
    for span in sorted(spans):
        offset, address, num_bytes = runs[-1] if runs else (-1, -1, 0)
        if (offset + num_bytes, address + num_bytes) == (span.offset, span.address):
            runs[-1] = Span(offset, address, num_bytes + span.num_bytes)
        else:
            runs.append(span)
    return runs
