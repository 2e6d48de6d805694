"""`kvmesh status`: the mesh's instances in a table, asked of the gateway's admin port."""

from __future__ import annotations

import argparse
import json
import sys

import grpc
from google.protobuf import json_format

from kvmesh.console import table
from mesh.errors import KvmeshError, from_rpc_error
from protos import status_pb2, status_pb2_grpc

TIMEOUT_S = 10.0
HEADER = (
    "instance", "address", "state", "incarnation", "requests", "waiting",
    "blocks", "sealed", "in host", "on disk", "leases", "tokens/s", "steps", "rss MiB", "up s",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--admin-addr", help="the gateway's admin port; default: the port after --addr"
    )
    parser.add_argument("--json", action="store_true", help="the whole answer as JSON")


def run_status(args: argparse.Namespace) -> int:
    """Prints the table; exit code 0 when every instance is ready, 1 when not or unreachable."""
    address = args.admin_addr or admin_address(args.addr)
    try:
        instances = fetch(address)
    except KvmeshError as error:
        print(f"kvmesh status: nothing answers at {address}: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([_as_dict(instance) for instance in instances], indent=2))
    else:
        print(render(instances))
    return 0 if instances and all(instance.ready for instance in instances) else 1


def admin_address(addr: str) -> str:
    """Where `kvmesh up` puts the admin port of a gateway: the next port."""
    host, _, port = addr.rpartition(":")
    return f"{host}:{int(port) + 1}"


def fetch(address: str) -> list[status_pb2.InstanceStatus]:
    """Every instance the gateway knows, itself first. Raises KvmeshError."""
    with grpc.insecure_channel(address) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        try:
            return list(stub.GetStatus(status_pb2.GetStatusRequest(), timeout=TIMEOUT_S).instances)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def render(instances: list[status_pb2.InstanceStatus]) -> str:
    """The table, the models served and the details of what is not ready."""
    ranks: dict[int, int] = {}
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for instance in instances:
        rank = ranks.get(instance.role, 0)
        ranks[instance.role] = rank + 1
        name = status_pb2.Role.Name(instance.role).removeprefix("ROLE_").lower()
        rows.append(_row(f"{name} {rank}", instance))
        if not instance.ready:
            notes.append(f"{name} {rank}: {instance.detail or 'not ready'}")
    models = {i.model.name: i.model for i in instances if i.HasField("model")}
    notes += [
        f"model {model.name}: {model.architecture}, context {model.context_len} tokens, "
        f"{model.block_tokens} tokens a block, fingerprint {model.fingerprint.hex()[:16]}"
        for model in models.values()
    ]
    return "\n".join([table(HEADER, rows), *notes])


def _row(name: str, instance: status_pb2.InstanceStatus) -> tuple[str, ...]:
    counts = instance.counts
    return (
        name,
        instance.address,
        "ready" if instance.ready else "not ready",
        instance.incarnation[:8],
        str(counts.num_requests),
        str(counts.num_waiting),
        f"{counts.num_blocks_used}/{counts.num_blocks}",
        str(counts.num_blocks_sealed),
        str(counts.num_blocks_in_host),
        str(counts.num_blocks_on_disk),
        str(counts.num_leases),
        f"{counts.tokens_per_s:.1f}",
        str(counts.num_steps),
        f"{counts.rss_num_bytes / 2**20:.0f}",
        f"{instance.uptime_s:.0f}",
    )


def _as_dict(instance: status_pb2.InstanceStatus) -> dict[str, object]:
    return json_format.MessageToDict(
        instance, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
