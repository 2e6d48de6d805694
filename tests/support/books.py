"""What every process of a mesh must hold again when nothing runs: nothing.

Owns the baseline of descriptors and tasks; asks each process for its counters and its own check().
"""

from __future__ import annotations

import grpc

from protos import status_pb2, status_pb2_grpc
from tests.support.mesh import Mesh

NUM_SPARE_TASKS = 4  # health checks and reconnects that a poll may meet
NUM_SPARE_FDS = 6
NUM_FDS_PER_LOSS = 6  # a peer that came back costs NIXL up to 2 descriptors a side and try
_ZERO = {
    "num_requests", "num_sequences", "num_waiting", "num_leases", "num_pins", "num_reservations",
    "num_blocks_private", "num_blocks_quarantined",
}  # fmt: skip
_PROMISES = {
    "num_leases", "num_pins", "num_reservations", "num_blocks_private", "num_blocks_quarantined"
}  # fmt: skip


class Books:
    """Taken while the mesh is idle and warm; `settle` waits until it is so again."""

    def __init__(self, mesh: Mesh, *, timeout_s: float = 20.0) -> None:
        self._mesh = mesh
        self._num_losses = 0
        self._loads: dict[str, tuple[int, int]] = {}
        self.problems: list[str] = []
        self.settle(timeout_s=timeout_s)

    def lose(self) -> None:
        """A process was killed or frozen: what it held in a store ends by its deadline only."""
        self._num_losses += 1

    def settle(self, *, expects_promises: bool = False, timeout_s: float = 20.0) -> None:
        """Waits until all are ready and nothing is held; `expects_promises` of the dead may be."""

        def is_settled() -> bool:
            self.problems = self._find_problems(expects_promises)
            return not self.problems

        try:
            self._mesh.wait_until(is_settled, "the books balance", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{self.problems}\n{error}") from None

    def _find_problems(self, expects_promises: bool) -> list[str]:
        addresses = [self._mesh.admin_address]
        workers = [*self._mesh.prefills, *self._mesh.decodes]
        addresses += [process.address for process in [*workers, *self._mesh.kvstores]]
        problems: list[str] = []
        for address in addresses:
            with grpc.insecure_channel(address) as channel:
                stub = status_pb2_grpc.StatusServiceStub(channel)
                try:
                    instances = stub.GetStatus(status_pb2.GetStatusRequest(), timeout=5).instances
                except grpc.RpcError as error:  # its link has just come back
                    problems.append(f"{address} does not answer: {error}")
                    continue
                problems += self._check(instances[0], expects_promises)
                problems += [
                    f"{i.address} is not ready: {i.detail}" for i in instances if not i.ready
                ]
                problems += _audit(stub, instances[0])
        return problems

    def _check(self, status: status_pb2.InstanceStatus, expects_promises: bool) -> list[str]:
        name, counts = f"{status_pb2.Role.Name(status.role)} {status.address}", status.counts
        is_store = status.role == status_pb2.ROLE_KVSTORE
        zero = _ZERO - (_PROMISES if is_store and expects_promises else set())
        problems = [f"{name}: {key} {getattr(counts, key)}" for key in zero if getattr(counts, key)]
        if not is_store and counts.num_blocks_used:
            problems.append(f"{name}: {counts.num_blocks_used} blocks in use")
        if any(state in status.detail for state in ("down", "connecting", "leaving")):
            problems.append(f"{name}: {status.detail}")
        num_fds, num_tasks = counts.num_fds, counts.num_tasks
        base_fds, base_tasks = self._loads.setdefault(status.incarnation, (num_fds, num_tasks))
        if num_tasks > base_tasks + NUM_SPARE_TASKS:
            problems.append(f"{name}: {num_tasks} tasks, {base_tasks} before")
        if num_fds > base_fds + NUM_SPARE_FDS + NUM_FDS_PER_LOSS * self._num_losses:
            problems.append(f"{name}: {num_fds} descriptors, {base_fds} before")
        return problems


def _audit(stub: status_pb2_grpc.StatusServiceStub, status: status_pb2.InstanceStatus) -> list[str]:
    """The process's own check()."""
    try:
        failure = stub.CheckBooks(status_pb2.CheckBooksRequest(), timeout=5).failure
    except grpc.RpcError as error:
        # A process without a check() of its own has its counters above, and no more.
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:  # pyright: ignore[reportAttributeAccessIssue]
            return []
        raise
    return [f"{status.address}: {failure}"] if failure else []
