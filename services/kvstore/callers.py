"""The workers that have said Connect, by incarnation.

Owns who is known; a store restarts with an empty table, so its callers must connect again. Never
loads a caller's NIXL metadata: workers initiate every transfer, the store's agent needs no peer.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.errors import FailedPrecondition
from protos import kvstore_pb2

CALLER_IDLE_S = 3600.0


class CallerTable:
    """Known incarnations; one that is silent for `idle_s` seconds is forgotten."""

    def __init__(self, *, clock: Callable[[], float], idle_s: float = CALLER_IDLE_S) -> None:
        self._clock = clock
        self._idle_s = idle_s
        self._agents: dict[str, kvstore_pb2.Agent] = {}
        self._heard_at: dict[str, float] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._agents)

    def add(self, agent: kvstore_pb2.Agent) -> None:
        """Makes an incarnation known; repeating replaces its agent."""
        self._agents[agent.incarnation] = agent
        self._hear(agent.incarnation)

    def require(self, incarnation: str) -> None:
        """Refuses a caller that has not connected to this life of the store."""
        if incarnation not in self._agents:
            raise FailedPrecondition(
                f"incarnation {incarnation!r} is not connected to this store; call Connect first",
                reason="UNKNOWN_INCARNATION",
                retryable=True,
            )
        self._hear(incarnation)

    def expire(self) -> None:
        """Forgets silent callers."""
        oldest = self._clock() - self._idle_s
        for incarnation in [name for name, at in self._heard_at.items() if at <= oldest]:
            del self._heard_at[incarnation]
            del self._agents[incarnation]

    def _hear(self, incarnation: str) -> None:
        self._heard_at.pop(incarnation, None)
        self._heard_at[incarnation] = self._clock()
