"""A block's file: one page of header, then the block's bytes.

Owns what the header says and how it is checked; never opens a file. The header names the block and
carries the digest that was stored at Seal; it is itself guarded by a checksum, so that torn,
truncated and foreign files are told apart from blocks before any of their bytes are used.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from kv.block import KEY_NUM_BYTES
from kv.digest import WORD_NUM_BYTES

HEADER_NUM_BYTES = 4096  # the bytes after it stay aligned to pages
DIGEST_UNIT = WORD_NUM_BYTES  # blocks of other sizes have no digest and stay in memory
VERSION = 1
_MAGIC = b"kvmesh b"
_FIELDS = struct.Struct(f"<8sII{KEY_NUM_BYTES}sQQ")  # magic, version, 0, key, num_bytes, digest
_CHECKSUM = struct.Struct("<I")  # CRC-32 of the fields


class BadHeader(ValueError):
    """The bytes are no header of this version, or not as they were written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Which block a file holds: its key, its length in bytes and its digest."""

    key: bytes
    num_bytes: int
    digest: int

    def encode(self) -> bytes:
        """HEADER_NUM_BYTES bytes."""
        fields = _FIELDS.pack(_MAGIC, VERSION, 0, self.key, self.num_bytes, self.digest)
        return (fields + _CHECKSUM.pack(zlib.crc32(fields))).ljust(HEADER_NUM_BYTES, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """The header in the first bytes of a file; BadHeader says what is wrong with it."""
        if len(data) < HEADER_NUM_BYTES:
            raise BadHeader(f"{len(data)} bytes; a header has {HEADER_NUM_BYTES}")
        magic, version, _, key, num_bytes, digest = _FIELDS.unpack_from(data)
        if magic != _MAGIC:
            raise BadHeader("not a block's file")
        if version != VERSION:
            raise BadHeader(f"version {version}; this store reads {VERSION}")
        header = cls(key=key, num_bytes=num_bytes, digest=digest)
        if data != header.encode():
            raise BadHeader("the checksum does not match")
        return header


def file_num_bytes(num_bytes: int) -> int:
    """What the file of a block of num_bytes takes of the disk's budget: whole pages."""
    return HEADER_NUM_BYTES + -(-num_bytes // HEADER_NUM_BYTES) * HEADER_NUM_BYTES
