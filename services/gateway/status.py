"""What the gateway's StatusService says.

Owns the snapshot: itself first, then every process it polls. Never asks a process itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mesh.process import num_fds, rss_num_bytes, task_count
from protos import status_pb2
from services.gateway.registry import Registry
from services.gateway.router import Router


class MeshStatus:
    """Snapshots of the whole mesh."""

    def __init__(
        self, router: Router, registry: Registry, incarnation: str, is_ready: Callable[[], bool]
    ) -> None:
        self.address = ""
        self._router = router
        self._registry = registry
        self._incarnation = incarnation
        self._is_ready = is_ready
        self._started_at = time.monotonic()

    def snapshot(self) -> list[status_pb2.InstanceStatus]:
        """The gateway, prefills, decodes, kvstores."""
        return [self._own(), *(instance.status for instance in self._router.instances)]

    def _own(self) -> status_pb2.InstanceStatus:
        ready = self._is_ready()
        return status_pb2.InstanceStatus(
            role=status_pb2.ROLE_GATEWAY,
            address=self.address,
            incarnation=self._incarnation,
            ready=ready,
            detail="" if ready else "draining, or no prefill and decode agree on a model",
            counts=status_pb2.Counts(
                num_requests=self._registry.num_requests,
                num_sequences=self._registry.num_sequences,
                num_tasks=task_count(),
                num_fds=num_fds(),
                rss_num_bytes=rss_num_bytes(),
            ),
            uptime_s=time.monotonic() - self._started_at,
        )
