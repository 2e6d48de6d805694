"""A child process that owns an arena and answers questions about it: one JSON line each way.

Run by test_nixl_transfer.py with the arena's length in bytes; ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import sys

import numpy as np

from kv.nixl_transfer import NixlTransfer


async def main(num_bytes: int) -> None:
    arena = np.zeros(num_bytes, dtype=np.uint8)
    loop = asyncio.get_running_loop()
    transfer = NixlTransfer.create(role="owner", incarnation="child", arena=arena, loop=loop)
    agent = dataclasses.asdict(transfer.agent)
    print(json.dumps({**agent, "metadata": transfer.agent.metadata.hex()}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        question = json.loads(line)
        if "fill" in question:
            arena[:] = np.random.default_rng(question["fill"]).integers(0, 256, num_bytes, np.uint8)
        print(json.dumps(hashlib.sha256(arena.tobytes()).hexdigest()), flush=True)
    transfer.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
