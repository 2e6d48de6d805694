"""`kvmesh health`: asks one process whether it is alive or ready, for health checks of containers.

Owns the question and the exit code; what ready means is each service's own.
"""

from __future__ import annotations

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICES = ("readiness", "liveness")
SERVING = health_pb2.HealthCheckResponse.SERVING


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--service", choices=SERVICES, default="readiness", help="what is asked")
    parser.add_argument("--timeout-s", type=float, default=3.0, help="longest wait, seconds")


def run_health(args: argparse.Namespace) -> int:
    """Prints the state of the process at --addr; exit code 0 when it serves, else 1."""
    try:
        state = check(args.addr, args.service, args.timeout_s)
    except grpc.RpcError as error:
        code = error.code().name  # pyright: ignore[reportAttributeAccessIssue]
        print(f"kvmesh health: nothing answers at {args.addr}: {code}", file=sys.stderr)
        return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(state))
    return 0 if state == SERVING else 1


def check(address: str, service: str, timeout_s: float) -> int:
    """The ServingStatus of one name of grpc.health.v1. Raises grpc.RpcError."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return stub.Check(request, timeout=timeout_s).status  # pyright: ignore[reportAttributeAccessIssue]
