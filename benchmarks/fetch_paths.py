"""Blocks from a store over TCP: the worker's READ against Fetch, the store's WRITE.

Owns a store process in a network namespace of its own, UCX limited to TCP on both sides, and one
client for each path in this process; both get the same leased blocks into the same arena, as pulls
do. Bytes are compared before anything is timed. A Fetch's time includes its gRPC call. Medians of
turns that alternate between the paths. Needs the right to make a namespace.

    UCX_TLS=tcp python -m benchmarks.fetch_paths --out benchmarks/results/fetch_paths.json
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import hashlib
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.transfer_bandwidth import cpu_name
from kv.nixl_transfer import NixlTransfer
from kv.path import KvPath
from mesh.channel import open_channel
from mesh.kvstore_shard import Shard
from protos import kvstore_pb2
from tests.support.mesh import Process, spawn, wait_ready
from tests.support.netns import DATA, Namespace

CASES = (  # block_num_bytes, num_blocks
    (64 * 2**10, 1),
    (64 * 2**10, 64),
    (1 * 2**20, 16),
    (1 * 2**20, 128),
    (9 * 2**20, 14),
)
ARENA_NUM_BYTES = 256 * 2**20
DEADLINE_S = 60.0


class Bench:
    """One store, and this process's arena with two connections to it."""

    def __init__(self, store: Process, namespace: Namespace) -> None:
        self._arena = np.random.default_rng(7).integers(0, 256, ARENA_NUM_BYTES, np.uint8)
        self._transfers = {path: self._make_transfer(path, namespace) for path in KvPath}
        self._shards = {path: self._make_shard(path, store.address) for path in KvPath}
        self._runs = [asyncio.ensure_future(shard.run()) for shard in self._shards.values()]

    async def close(self) -> None:
        """Ends both connections."""
        for run in self._runs:
            run.cancel()
        await asyncio.wait(self._runs)
        for path in KvPath:
            await self._shards[path].close()
            self._transfers[path].close()

    async def measure(self, size: int, num: int, repeats: int) -> dict[str, Any]:
        """One block size and count: microseconds and GB/s (1e9) of both paths."""
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(shard.up.wait() for shard in self._shards.values()))
        keys = [hashlib.sha256(f"{size} {num} {index}".encode()).digest() for index in range(num)]
        expected = self._arena[: size * num].copy()
        await self._publish(keys, size)
        leases = {path: await self._lease(path, keys, size) for path in KvPath}
        durations: dict[KvPath, list[float]] = {path: [] for path in KvPath}
        for turn in range(repeats + 1):  # the first one warms up and is checked
            for path, lease in leases.items():
                if turn == 0:
                    self._arena[: size * num] = 0
                started_at = time.perf_counter()
                await self._get(path, lease, size)
                durations[path].append(time.perf_counter() - started_at)
                if not np.array_equal(self._arena[: size * num], expected):
                    raise SystemExit(f"wrong bytes by {path}: nothing was measured")
        for path, lease in leases.items():
            request = kvstore_pb2.ReleaseRequest(
                incarnation=f"bench-{path}",
                lease_id=lease.lease_id,
                life=self._shards[path].life,
            )
            await self._shards[path].call("Release", request, DEADLINE_S)
        row: dict[str, Any] = {"block_num_bytes": size, "num_blocks": num}
        for path, name in ((KvPath.READ, "read"), (KvPath.WRITE, "fetch")):
            duration_s = statistics.median(durations[path][1:])
            row[f"{name}_us"] = round(duration_s * 1e6, 1)
            row[f"{name}_gb_per_s"] = round(num * size / duration_s / 1e9, 3)
        row["fetch_to_read"] = round(row["read_us"] / row["fetch_us"], 2)
        return row

    def _make_transfer(self, path: KvPath, namespace: Namespace) -> NixlTransfer:
        return NixlTransfer.create(
            role=f"bench-{path}",
            incarnation=f"bench-{path}",
            arena=self._arena,
            loop=asyncio.get_running_loop(),
            environment={"UCX_NET_DEVICES": namespace.device(DATA)},
        )

    def _make_shard(self, path: KvPath, address: str) -> Shard:
        transfer = self._transfers[path]
        return Shard(address=address, channel=open_channel(address), transfer=transfer, path=path)

    async def _publish(self, keys: list[bytes], size: int) -> None:
        shard, incarnation = self._shards[KvPath.READ], "bench-read"
        request = kvstore_pb2.ReserveRequest(
            incarnation=incarnation, keys=keys, num_bytes=size, ttl_s=300
        )
        reserved = (await shard.call("Reserve", request, DEADLINE_S)).reservations
        slots = [reservation.slot.offset for reservation in reserved]
        local = [index * size for index in range(len(keys))]
        await shard.write(local, slots, size, DEADLINE_S, lambda _: None, life=shard.life)
        ids = [reservation.reservation_id for reservation in reserved]
        seal = kvstore_pb2.SealRequest(
            incarnation=incarnation,
            reservation_ids=ids,
            digests=[0] * len(ids),
            life=shard.life,
        )
        await shard.call("Seal", seal, DEADLINE_S)

    async def _lease(self, path: KvPath, keys: list[bytes], size: int) -> Any:
        request = kvstore_pb2.LookupRequest(
            incarnation=f"bench-{path}", keys=keys, num_bytes=size, ttl_s=300
        )
        return await self._shards[path].call("Lookup", request, DEADLINE_S)

    async def _get(self, path: KvPath, lease: Any, size: int) -> None:
        shard = self._shards[path]
        await shard.read(
            [index * size for index in range(len(lease.offsets))],
            lease.offsets,
            size,
            DEADLINE_S,
            lambda _: None,
            life=shard.life,
            lease_id=lease.lease_id,
        )


async def measure_all(store: Process, namespace: Namespace, repeats: int) -> list[dict[str, Any]]:
    """All cases; a full store evicts the blocks of earlier ones."""
    bench = Bench(store, namespace)
    rows = [await bench.measure(size, num, repeats) for size, num in CASES]
    await bench.close()
    return rows


def report(rows: list[dict[str, Any]], out: Path | None, repeats: int) -> None:
    """A line for each case on stdout, and the JSON file."""
    for row in rows:
        print(
            f"{row['num_blocks']:>4} x {row['block_num_bytes'] / 2**10:>6.0f} KiB   "
            f"READ {row['read_gb_per_s']:.2f} GB/s   Fetch {row['fetch_gb_per_s']:.2f} GB/s   "
            f"{row['fetch_to_read']:.2f} times as fast"
        )
    if out is None:
        return
    result = {
        "what": "NIXL READ by a worker against Fetch (NIXL WRITE by the store, its gRPC call "
        "included), UCX over TCP between two network namespaces of one host",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {cpu_name()}",
        "python": platform.python_version(),
        "load_average_1min": round(os.getloadavg()[0], 1),
        "repeats": repeats,
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="READ against Fetch over TCP")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns per figure")
    arguments = parser.parse_args()
    namespace = Namespace()
    store = spawn(
        "kvstore",
        *("--kv-bytes", str(ARENA_NUM_BYTES), "--host", namespace.host),
        env={"UCX_TLS": "tcp", "UCX_NET_DEVICES": f"{DATA}-in"},
        prefix=namespace.prefix,
    )
    try:
        wait_ready(store)
        rows = asyncio.run(measure_all(store, namespace, arguments.repeats))
    finally:
        store.popen.terminate()
        store.popen.wait(10)
        namespace.close()
    report(rows, arguments.out, arguments.repeats)


if __name__ == "__main__":
    main()
