"""Hit rate of the store's index on a request trace, by store size, against an endless store.

    python -m benchmarks.trace_hits --trace conversation_trace.jsonl --out FILE

Replays a trace in Mooncake's form (JSON lines: `timestamp` in ms, `hash_ids`, one for each 512
tokens of the prompt, equal where the prompt is equal up to there; a last, partly filled block has
an id, too) through BlockIndex, with the trace's clock and without bytes. A request is what the mesh
makes of it: prefill's Lookup and Release; Reserve and Seal of what is missing, CHUNK_BLOCKS at a
time; the decode rank's Lookup and Release. It is over before the next one arrives. A hit is a block
in the prefix that prefill's Lookup finds, and the rate is hits by blocks of prompts. Generated
tokens are not in the trace, so nothing stands for the blocks that decode ranks seal.

First an endless store must give exactly the hits of a plain set of ids. The two plain LRUs are to
show what the order of eviction is worth: they drop the block that was used least recently even if
its children stay and can no longer be found.
"""

from __future__ import annotations

import argparse
import datetime
import enum
import hashlib
import json
import platform
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from benchmarks.transfer_bandwidth import cpu_name
from kv.layout import BlockLayout
from mesh.rendezvous import owner
from services.kvstore.arena import SlotAllocator
from services.kvstore.block import LeaseOutcome, ReserveOutcome
from services.kvstore.index import BlockIndex

BLOCK_TOKENS = 512
BLOCK_NUM_BYTES = BlockLayout(
    num_kv_heads=8, num_layers=36, block_tokens=BLOCK_TOKENS, head_dim=128, dtype_num_bytes=2
).num_bytes
"""Of Qwen3-8B, bf16."""
ENDLESS = 0
SIZES = (ENDLESS, *(2**power for power in range(16, 10, -1)))
"""Of stores, in blocks, all shards of one together."""
SHARDED_SIZES = (ENDLESS, 2**15, 2**13)
CHUNK_BLOCKS = 16
"""Blocks of a Reserve: the worker computes and publishes 8,192 tokens at a time."""
TTL_S = 30.0


class Order(enum.StrEnum):
    """What is replayed: the index, or a plain LRU by the order in which a Lookup uses blocks."""

    INDEX = "index"
    LRU_PARENTS_LAST = "lru, a lookup uses parents last"
    LRU_PARENTS_FIRST = "lru, a lookup uses parents first"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One replay; num_blocks may be ENDLESS."""

    num_blocks: int
    num_shards: int = 1
    order: Order = Order.INDEX


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt: when it came, seconds, and the keys of its blocks, parents first."""

    at_s: float
    keys: list[bytes]


class IndexStore:
    """Shards of num_blocks blocks in all, each a BlockIndex."""

    def __init__(self, num_blocks: int, owners: dict[bytes, int]) -> None:
        self._now_s = 0.0
        self._owners = owners
        num_shards = max(owners.values()) + 1
        self._shards = [
            BlockIndex(
                SlotAllocator(num_blocks // num_shards * BLOCK_NUM_BYTES),
                clock=lambda: self._now_s,
            )
            for _ in range(num_shards)
        ]

    def serve(self, request: Request) -> int:
        """Runs one request; returns how many leading blocks were there."""
        self._now_s = request.at_s
        keys = request.keys
        num_found = self._look_up("prefill", keys)
        for first in range(num_found, len(keys), CHUNK_BLOCKS):
            self._publish(keys[first : first + CHUNK_BLOCKS])
        self._look_up("decode", keys)
        return num_found

    def check(self) -> None:
        """Asserts that the books agree and that nothing is held after a replay."""
        for index in self._shards:
            index.check()
            counts = index.counts()
            assert not (counts.num_leases or counts.num_reserved or counts.num_quarantined)

    def _assign(self, keys: Sequence[bytes]) -> dict[int, list[int]]:
        """Shard to the positions of its keys, in order, as mesh.kvstore_shards has it."""
        if len(self._shards) == 1:
            return {0: list(range(len(keys)))}
        positions: dict[int, list[int]] = {}
        for position, key in enumerate(keys):
            positions.setdefault(self._owners[key], []).append(position)
        return positions

    def _look_up(self, who: str, keys: Sequence[bytes]) -> int:
        """Blocks of the common prefix: up to the first that its own shard did not lend."""
        num_found = len(keys)
        for shard, positions in self._assign(keys).items():
            index = self._shards[shard]
            own = [keys[position] for position in positions]
            leased = index.lookup(who, own, BLOCK_NUM_BYTES, ttl_s=TTL_S)
            num_lent = len(leased.blocks)
            if num_lent:
                assert index.release(who, leased.lease_id) is LeaseOutcome.HELD
            if num_lent < len(own):
                num_found = min(num_found, positions[num_lent])
        return num_found

    def _publish(self, keys: Sequence[bytes]) -> None:
        for shard, positions in self._assign(keys).items():
            index = self._shards[shard]
            own = [keys[position] for position in positions]
            answers = index.reserve("prefill", own, BLOCK_NUM_BYTES, ttl_s=TTL_S)
            new = [a.reservation_id for a in answers if a.outcome is ReserveOutcome.RESERVED]
            assert all(index.seal("prefill", new, [0] * len(new)))


class PlainLru:
    """One store that knows nothing of parents. parents_last: a Lookup uses the first block last."""

    def __init__(self, num_blocks: int, *, parents_last: bool) -> None:
        self._num_blocks = num_blocks
        self._parents_last = parents_last
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def serve(self, request: Request) -> int:
        """As IndexStore.serve."""
        num_found = self._look_up(request.keys)
        for key in request.keys[num_found:]:
            self._blocks[key] = None
            self._blocks.move_to_end(key)
            if len(self._blocks) > self._num_blocks:
                self._blocks.popitem(last=False)
        self._look_up(request.keys)
        return num_found

    def check(self) -> None:
        """Asserts that no more is held than there is room for."""
        assert len(self._blocks) <= self._num_blocks

    def _look_up(self, keys: Sequence[bytes]) -> int:
        missing = (n for n, key in enumerate(keys) if key not in self._blocks)
        num_found = next(missing, len(keys))
        found = keys[:num_found]
        for key in reversed(found) if self._parents_last else found:
            self._blocks.move_to_end(key)
        return num_found


@cache
def read_trace(path: Path) -> list[Request]:
    """The trace's requests in order of arrival."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    requests = [
        Request(at_s=line["timestamp"] / 1e3, keys=[_key(i) for i in line["hash_ids"]])
        for line in lines
    ]
    return sorted(requests, key=lambda request: request.at_s)


def _key(hash_id: int) -> bytes:
    return hashlib.sha256(hash_id.to_bytes(8, "little")).digest()


@cache
def owners_of(path: Path, num_shards: int) -> dict[bytes, int]:
    """The shard of every key of the trace."""
    members = [f"127.0.0.1:{50061 + n}" for n in range(num_shards)]
    keys = {key for request in read_trace(path) for key in request.keys}
    return {key: members.index(owner(key, members)) for key in keys}


def endless_hits(requests: Sequence[Request]) -> int:
    """Blocks whose id an earlier request had: a set, without any of the code under test."""
    seen: set[bytes] = set()
    num_hits = 0
    for request in requests:
        num_hits += sum(key in seen for key in request.keys)
        seen.update(request.keys)
    return num_hits


def measure(path: Path, case: Case) -> dict[str, object]:
    """Replays one case; ValueError if an endless store's hits are not those of the set."""
    requests, owners = read_trace(path), owners_of(path, case.num_shards)
    room = case.num_blocks or case.num_shards * len(owners)
    if case.order is Order.INDEX:
        store = IndexStore(room, owners)
    else:
        store = PlainLru(room, parents_last=case.order is Order.LRU_PARENTS_LAST)
    num_hits, bound = sum(store.serve(request) for request in requests), endless_hits(requests)
    store.check()
    if case.num_blocks == ENDLESS and num_hits != bound:
        raise ValueError(f"an endless store: {num_hits} hits; a set of ids: {bound}")
    return {
        "order": case.order,
        "num_shards": case.num_shards,
        "num_blocks": case.num_blocks or "endless",
        "gib": case.num_blocks * BLOCK_NUM_BYTES / 2**30 or "endless",
        "hit_rate": round(num_hits / sum(len(request.keys) for request in requests), 4),
        "of_endless": round(num_hits / bound, 4),
    }


def cases() -> list[Case]:
    """All replays, the endless ones first."""
    found = [Case(num_blocks=size, order=order) for size in SIZES for order in Order]
    found += [Case(num_blocks=size, num_shards=n) for size in SHARDED_SIZES for n in (2, 4)]
    return sorted(found, key=lambda case: case.num_blocks != ENDLESS)


def about(path: Path) -> dict[str, object]:
    """The trace, and where and with what it was replayed."""
    requests = read_trace(path)
    num_keys = sum(len(request.keys) for request in requests)
    return {
        "what": "blocks of prompts found in the store, by its size, on a request trace",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {cpu_name()}",
        "python": platform.python_version(),
        "trace": path.name,
        "trace_s": round(requests[-1].at_s - requests[0].at_s, 1),
        "num_requests": len(requests),
        "num_prompt_blocks": num_keys,
        "num_distinct_blocks": len({key for request in requests for key in request.keys}),
        "endless_hit_rate": round(endless_hits(requests) / num_keys, 4),
        "block_tokens": BLOCK_TOKENS,
        "block_num_bytes": BLOCK_NUM_BYTES,
        "block": "Qwen3-8B, bf16: 8 heads x 36 layers x K and V x 512 tokens x 128 x 2 bytes",
    }


def main() -> None:
    """Replays every case and writes one JSON file."""
    parser = argparse.ArgumentParser(description="Hit rate of the store's index on a trace")
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines in Mooncake's form")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    started_at = time.monotonic()
    result = about(options.trace)
    print("\n".join(f"{name}: {value}" for name, value in result.items()), flush=True)
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor() as pool:
        for row in pool.map(partial(measure, options.trace), cases()):
            rows.append(row)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    print(f"{time.monotonic() - started_at:.0f} s")
    if options.out is not None:
        options.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
