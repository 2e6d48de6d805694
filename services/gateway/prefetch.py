"""A pull that a decode rank begins while prefill computes a prompt's last chunk.

Owns the handle on the rank, and its load there, until an admission takes it over. Never waits.
"""

from __future__ import annotations

from contextlib import ExitStack

from protos import decode_pb2
from services.gateway.session import RankSession


class Prefetch:
    """One prompt's prefetch on one rank. Ended by `take` or `close`."""

    def __init__(self, session: RankSession, command: decode_pb2.Prefetch) -> None:
        self.session = session
        self._handle = session.prefetch(command)
        self._load = ExitStack()
        self._load.enter_context(session.instance.load(len(command.prompt_token_ids)))

    def take(self) -> int | None:
        """The handle to admit the request under; None when the rank was lost or takes no more."""
        instance, handle = self.session.instance, self._handle
        if not instance.is_ready or not self.session.has_prefetch(handle):
            self.close()
            return None
        self._load.close()
        return handle

    def close(self) -> None:
        """Tells the rank that nothing follows, unless it was taken."""
        self._load.close()
        self.session.cancel(self._handle)
