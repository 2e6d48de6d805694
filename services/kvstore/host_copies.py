"""Copies of blocks in host memory, for an arena in a GPU's.

Owns how moves become copies of bytes: many at a time, neighbours in one. Verifies nothing: who
reads a block from the arena does, as ever, and what it reports is dropped here, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.kvstore.copies import CopyEngine, CopyFailed, Span, UnusableBlock, merged
from services.kvstore.lower_tier import Move


class HostCopies:
    """Host memory from an address on, which `copy_offset` counts from."""

    def __init__(self, engine: CopyEngine, address: int) -> None:
        self._engine = engine
        self._address = address

    def read(self, moves: Sequence[Move]) -> None:
        """Fills slots."""
        try:
            self._engine.write(self._spans(moves))
        except RuntimeError as error:
            raise UnusableBlock("host memory", "host_read", str(error)) from error

    def write(self, moves: Sequence[Move]) -> None:
        """Copies from slots."""
        try:
            self._engine.read(self._spans(moves))
        except RuntimeError as error:
            raise CopyFailed("host memory", "host_write", str(error)) from error

    def remove(self, key: bytes) -> None:
        """Nothing: a slot is written over."""

    def close(self) -> None:
        """Nothing: the memory is another's."""

    def _spans(self, moves: Sequence[Move]) -> list[Span]:
        return merged(
            Span(move.offset, self._address + move.copy_offset, move.header.num_bytes)
            for move in moves
        )
