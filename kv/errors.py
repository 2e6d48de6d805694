"""What can go wrong when blocks travel. Owns this row's error types; never maps them to gRPC."""

from __future__ import annotations

import asyncio


class TransferError(Exception):
    """A transfer failed and is over: nothing will be read or written for it any more."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"peer {peer}: {reason}")
        self.peer = peer
        self.reason = reason


class TransferTimeout(TransferError):
    """Our deadline passed while the transfer may still move bytes.

    `settled` resolves when the late transfer is over or its peer is gone; until then nobody may
    reuse the local memory it may still write.
    """

    def __init__(self, peer: str, reason: str, settled: asyncio.Future[None]) -> None:
        super().__init__(peer, reason)
        self.settled = settled


class PeerVersionMismatch(TransferError):
    """The peer runs another NIXL version; its metadata was never loaded: it could crash us."""

    def __init__(self, peer: str, *, ours: str, theirs: str) -> None:
        super().__init__(peer, f"NIXL version {theirs!r} differs from ours, {ours!r}")
        self.ours = ours
        self.theirs = theirs
