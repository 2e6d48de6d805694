"""What the store's books cost: lookups, seals and memory a block, without bytes and on one core.

Owns an index with a million blocks in prompts of 1,600 (a chain each), and a servicer over it. Both
are checked against what was put in before anything is timed. The servicer is called as gRPC calls
it, from the request's bytes to the response's; `over_grpc` adds a channel, with the client in the
same process and on the same core. Lookups are of random prompts; each is followed by its Release,
which is counted in the time. Seconds are the process's CPU seconds, so that other work on the
machine counts less. Medians of turns.

    python -m benchmarks.kvstore_index --out benchmarks/results/kvstore_index.json
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np

from benchmarks.transfer_bandwidth import cpu_name
from kv.transfer import Agent, Transfer
from mesh.channel import MAX_MESSAGE_BYTES
from mesh.process import rss_num_bytes
from mesh.server import ServiceServer
from mesh.telemetry import Telemetry
from protos import kvstore_pb2, kvstore_pb2_grpc
from services.kvstore.arena import SlotAllocator
from services.kvstore.callers import CallerTable
from services.kvstore.index import BlockIndex
from services.kvstore.servicer import KvStoreServicer

BLOCK_NUM_BYTES = 2 * 2**20
PROMPT_LEN = 1600
TTL_S = 300.0
WHO = "bench"
LIFE = "kvstore-bench"


class NamedTransfer:
    """Stands for NIXL: as nobody fetches, the store only asks who it is."""

    def __init__(self, arena_num_bytes: int) -> None:
        self.agent = Agent(
            name=LIFE,
            nixl_version="0",
            metadata=b"",
            arena_address=0,
            arena_num_bytes=arena_num_bytes,
            incarnation=WHO,
            host_id="here",
        )


class Bench:
    """An index whose slots are numbers only: there is no arena behind them."""

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts
        slots = SlotAllocator(num_prompts * PROMPT_LEN * BLOCK_NUM_BYTES)
        telemetry = Telemetry.off()
        self.index = BlockIndex(slots, clock=time.monotonic)
        self.servicer = KvStoreServicer(
            index=self.index,
            callers=CallerTable(clock=time.monotonic),
            transfer=cast(Transfer, NamedTransfer(slots.num_bytes)),
            telemetry=telemetry,
        )
        self.telemetry = telemetry
        self._rng = random.Random(1)

    def keys(self, prompt: int) -> list[bytes]:
        """Fresh objects each time, as they come off the wire; made from the prompt's number."""
        data = random.Random(prompt).randbytes(32 * PROMPT_LEN)
        return [data[first : first + 32] for first in range(0, len(data), 32)]

    def fill(self, chain_len: int = PROMPT_LEN) -> dict[str, Any]:
        """Seals all prompts; blocks a second, and bytes of memory a block that this took.

        chain_len 1 makes every block a candidate for eviction, which costs most memory.
        """
        digests = list(range(PROMPT_LEN))
        reserve_s = seal_s = 0.0
        gc.collect()
        rss_before = rss_num_bytes()
        for prompt in range(self.num_prompts):
            keys = self.keys(prompt)
            started_at = time.process_time()
            answers = [
                answer
                for first in range(0, PROMPT_LEN, chain_len)
                for answer in self.index.reserve(
                    WHO, keys[first : first + chain_len], BLOCK_NUM_BYTES, ttl_s=TTL_S
                )
            ]
            reserved_at = time.process_time()
            ids = [answer.reservation_id for answer in answers]
            sealing_at = time.process_time()
            assert all(self.index.seal(WHO, ids, digests))
            seal_s += time.process_time() - sealing_at
            reserve_s += reserved_at - started_at
        gc.collect()
        num_blocks = self.num_prompts * PROMPT_LEN
        assert self.index.counts().num_sealed == num_blocks
        return {
            "num_blocks": num_blocks,
            "rss_num_bytes_per_block": round((rss_num_bytes() - rss_before) / num_blocks, 1),
            "reserve_blocks_per_s": round(num_blocks / reserve_s),
            "seal_blocks_per_s": round(num_blocks / seal_s),
            "reserve_and_seal_blocks_per_s": round(num_blocks / (reserve_s + seal_s)),
        }

    def requests(self, num: int) -> list[kvstore_pb2.LookupRequest]:
        """Lookups of random prompts."""
        prompts = [self._rng.randrange(self.num_prompts) for _ in range(num)]
        return [
            kvstore_pb2.LookupRequest(
                incarnation=WHO, keys=self.keys(prompt), num_bytes=BLOCK_NUM_BYTES, ttl_s=TTL_S
            )
            for prompt in prompts
        ]

    async def through_index(self, requests: list[kvstore_pb2.LookupRequest]) -> float:
        """Seconds for lookups and releases by direct calls."""
        prompts = [list(request.keys) for request in requests]
        started_at = time.process_time()
        for keys in prompts:
            leased = self.index.lookup(WHO, keys, BLOCK_NUM_BYTES, ttl_s=TTL_S)
            self.index.release(WHO, leased.lease_id)
        return time.process_time() - started_at

    async def through_servicer(self, requests: list[kvstore_pb2.LookupRequest]) -> float:
        """Seconds for the same from serialised requests to serialised responses."""
        wires = [request.SerializeToString() for request in requests]
        started_at = time.process_time()
        for wire in wires:
            request = kvstore_pb2.LookupRequest.FromString(wire)
            response = await self.servicer.Lookup(request, None)
            response.SerializeToString()
            release = _release(response.lease_id)
            await self.servicer.Release(release, None)
        return time.process_time() - started_at

    async def over_grpc(
        self, stub: kvstore_pb2_grpc.KvStoreServiceStub, requests: list[kvstore_pb2.LookupRequest]
    ) -> float:
        """Seconds for the same over a channel, one call after the other; the client included."""
        started_at = time.process_time()
        for request in requests:
            response = await stub.Lookup(request)
            release = _release(response.lease_id)
            await stub.Release(release)
        return time.process_time() - started_at

    async def check(self) -> None:
        """Every way finds whole prompts with the digests that were sealed, in order."""
        (request,) = self.requests(1)
        leased = self.index.lookup(WHO, list(request.keys), BLOCK_NUM_BYTES, ttl_s=TTL_S)
        response = await self.servicer.Lookup(request, None)
        assert leased.digests.tolist() == list(range(PROMPT_LEN))
        assert list(response.digests) == list(range(PROMPT_LEN))
        self.index.disconnect(WHO)


def _release(lease_id: int) -> kvstore_pb2.ReleaseRequest:
    return kvstore_pb2.ReleaseRequest(incarnation=WHO, lease_id=lease_id, life=LIFE)


async def measure(num_prompts: int, num_lookups: int, repeats: int) -> dict[str, Any]:
    """All figures."""
    bench = Bench(num_prompts)
    result = bench.fill()
    print(json.dumps(result), flush=True)
    server = ServiceServer(host="127.0.0.1", port=0, telemetry=bench.telemetry)
    register = kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server
    server.add(register, bench.servicer, "kvmesh.v1.KvStoreService")
    port = await server.start()
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        agent = kvstore_pb2.Agent(name=WHO, nixl_version="0", incarnation=WHO)
        await stub.Connect(kvstore_pb2.ConnectRequest(agent=agent))
        await bench.check()
        ways: dict[str, Callable[[list[kvstore_pb2.LookupRequest]], Awaitable[float]]] = {
            "index": bench.through_index,
            "servicer": bench.through_servicer,
            "over_grpc": lambda requests: bench.over_grpc(stub, requests),
        }
        result["lookups"] = {
            name: await _rate(bench, way, num_lookups, repeats) for name, way in ways.items()
        }
    await server.stop(0)
    return result


async def _rate(
    bench: Bench,
    way: Callable[[list[kvstore_pb2.LookupRequest]], Awaitable[float]],
    num_lookups: int,
    repeats: int,
) -> dict[str, Any]:
    await way(bench.requests(5))
    durations = [await way(bench.requests(num_lookups)) for _ in range(repeats)]
    lookups_per_s = num_lookups / statistics.median(durations)
    row = {
        "prompts_per_s": round(lookups_per_s, 1),
        "blocks_per_s": round(lookups_per_s * PROMPT_LEN),
        "blocks_per_s_min": round(num_lookups * PROMPT_LEN / max(durations)),
        "blocks_per_s_max": round(num_lookups * PROMPT_LEN / min(durations)),
    }
    print(json.dumps(row), flush=True)
    return row


def _fill_elsewhere(num_prompts: int, chain_len: int) -> dict[str, Any]:
    """The figures of a fill in a process of its own, whose memory nothing else has used."""
    flags = ("--prompts", str(num_prompts), "--chain-len", str(chain_len))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kvstore_index", *flags],
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="the cost of the store's books")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--prompts", type=int, default=640, help="prompts of 1,600 blocks")
    parser.add_argument("--lookups", type=int, default=200, help="lookups a turn")
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    parser.add_argument("--chain-len", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if arguments.chain_len:
        print(json.dumps(Bench(arguments.prompts).fill(arguments.chain_len)))
        return
    result = {
        "what": "lookups (each with its Release) of 1,600-block prompts, reservations and seals, "
        "per CPU second on one core; prompts are random ones of all that are sealed",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {cpu_name()}, one core, shared with other work",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "grpcio": grpc.__version__,
        "load_average_1min": round(os.getloadavg()[0], 1),
        "repeats": arguments.repeats,
        **asyncio.run(measure(arguments.prompts, arguments.lookups, arguments.repeats)),
        "unchained": _fill_elsewhere(arguments.prompts, chain_len=1),
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
