"""The workers that have said Connect, by incarnation.

Owns who is known; a store restarts with an empty table, so its callers must connect again. Never
loads a caller's NIXL metadata: that is done for those who Fetch (fetches.py).
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

    def add(self, agent: kvstore_pb2.Agent) -> str:
        """Makes an incarnation known; repeating replaces its agent. Name of the one before, or "".

        Refuses the agent of another incarnation: its memory is not the caller's.
        """
        for other in self._agents.values():
            if other.name == agent.name and other.incarnation != agent.incarnation:
                raise FailedPrecondition(
                    f"agent.name {agent.name!r} is that of incarnation {other.incarnation!r}",
                    reason="AGENT_TAKEN",
                )
        before = self._agents.get(agent.incarnation)
        self._agents[agent.incarnation] = agent
        self._hear(agent.incarnation)
        return before.name if before else ""

    def require(self, incarnation: str) -> kvstore_pb2.Agent:
        """Its agent. Refuses a caller that has not connected to this life of the store."""
        if incarnation not in self._agents:
            raise FailedPrecondition(
                f"incarnation {incarnation!r} is not connected to this store; call Connect first",
                reason="UNKNOWN_INCARNATION",
                retryable=True,
            )
        self._hear(incarnation)
        return self._agents[incarnation]

    def expire(self) -> list[str]:
        """Forgets silent callers; the names of their agents."""
        oldest = self._clock() - self._idle_s
        silent = [name for name, at in self._heard_at.items() if at <= oldest]
        for incarnation in silent:
            del self._heard_at[incarnation]
        return [self._agents.pop(incarnation).name for incarnation in silent]

    def _hear(self, incarnation: str) -> None:
        self._heard_at.pop(incarnation, None)
        self._heard_at[incarnation] = self._clock()
