"""How long from `docker-compose up` to the first token, and how large the images are.

`python -m benchmarks.compose`: builds compose.yaml's default profile, starts it --repeats times
from nothing (after the first time its files are in the page cache) and asks for one token over and
over from the moment that `up` is called. Needs root and a container engine, as tests/compose does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path

import grpc

from protos import gateway_pb2_grpc
from tests.compose.engine import docker
from tests.compose.images import BASE, built_images
from tests.compose.project import SERVICES, Project
from tests.support.generate import greedy_request
from tests.support.mesh import ROOT, free_port

OUT = ROOT / "benchmarks" / "results" / "compose.json"
TIMEOUT_S = 300.0
PROMPT = list(range(10, 74))


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="number of starts")
    parser.add_argument("--out", type=Path, default=OUT, help="where the result is written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, built_images(Path(folder) / "mirror") as settings:
        rows = [measure(settings) for _ in range(args.repeats)]
        result = report(rows, settings["KVMESH_TAG"])
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(settings: dict[str, str]) -> dict[str, float]:
    """One start from nothing: seconds from the call of `up`."""
    ports = {f"KVMESH_{name}": str(free_port()) for name in ("PORT", "ADMIN_PORT", "HTTP_PORT")}
    project = Project("kvmesh-bench", {**settings, **ports})
    began = time.monotonic()
    try:
        project.up()
        created = time.monotonic()
        wait_for_token(f"127.0.0.1:{ports['KVMESH_PORT']}", began + TIMEOUT_S)
        answered = time.monotonic()
        project.wait_healthy()
        healthy = time.monotonic()
    finally:
        project.down()
    return {
        "containers_started_s": round(created - began, 2),
        "first_token_s": round(answered - began, 2),
        "all_healthy_s": round(healthy - began, 2),
    }


def wait_for_token(address: str, deadline: float) -> None:
    """Asks until the first token of an answer is here. AssertionError at the deadline."""
    while time.monotonic() < deadline:
        with grpc.insecure_channel(address) as channel:
            stub = gateway_pb2_grpc.GenerationServiceStub(channel)
            try:
                for response in stub.Generate(greedy_request(PROMPT, 1), timeout=TIMEOUT_S):
                    if response.WhichOneof("event") == "delta":
                        return
            except grpc.RpcError:
                threading.Event().wait(0.1)
    raise AssertionError(f"{address}: no token within {TIMEOUT_S:g} s")


def report(rows: list[dict[str, float]], tag: str) -> dict[str, object]:
    """The figures with what they were taken on."""
    base = num_bytes(BASE)
    roles = sorted({service.partition("-")[0] for service in SERVICES})
    images = {role: num_bytes(f"kvmesh/{role}:{tag}") for role in roles}
    return {
        "what": "docker-compose up of the CPU mesh (models/demo, 1 gateway, 1 prefill, 2 decode, "
        "1 kvstore) until the first token outside; images are built before; docker looks at health "
        "every 5 s",
        "machine": f"{platform.machine()}, 2 cores shared with other work",
        "load_average_1min": round(os.getloadavg()[0], 1),
        "date": datetime.date.today().isoformat(),
        "docker": docker("version", "--format", "{{.Server.Version}}"),
        "base_image_mb": round(base / 1e6),
        "image_mb": {role: round(size / 1e6) for role, size in images.items()},
        "image_mb_above_base": {role: round((size - base) / 1e6) for role, size in images.items()},
        "rows": rows,
        "median_first_token_s": statistics.median(row["first_token_s"] for row in rows),
    }


def num_bytes(image: str) -> int:
    """An image's size, uncompressed, its base's layers included."""
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))


if __name__ == "__main__":
    main()
