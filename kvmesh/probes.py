"""Questions about this machine that `kvmesh doctor` asks in child processes, as one JSON line each.

`python -m kvmesh.probes NAME`: a probe may crash (native libraries do) without taking the doctor
along. Owns no judgement: it reports facts.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import importlib
import json
import os
import secrets
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from kv.path import choose, read_memory

if TYPE_CHECKING:
    from kv.nixl_transfer import NixlTransfer

NUM_BYTES = 2**20


def nixl() -> dict[str, object]:
    """Imports NIXL the way kv/nixl_transfer.py does and opens one UCX agent."""
    errors: list[str] = []
    for module in ("nixl_cu13", "nixl"):
        try:
            api = importlib.import_module(f"{module}._api")
        except ImportError as error:
            errors.append(f"{module}: {error}")
            continue
        agent = api.nixl_agent("doctor", api.nixl_agent_config(backends=["UCX"]))
        return {
            "module": module,
            "plugins": sorted(agent.get_plugin_list()),
            "backends": sorted(agent.backends),
        }
    return {"error": "; ".join(errors)}


def torch() -> dict[str, object]:
    """torch's version, its CPU threads and the CUDA devices it sees."""
    try:
        module = importlib.import_module("torch")
    except ImportError as error:
        return {"error": str(error)}
    has_cuda = module.cuda.is_available()
    count = module.cuda.device_count() if has_cuda else 0
    return {
        "version": module.__version__,
        "num_threads": module.get_num_threads(),
        "cuda": module.version.cuda,
        "devices": [module.cuda.get_device_name(index) for index in range(count)],
    }


def cma_owner() -> dict[str, object]:
    """Holds a random buffer for a sibling to read; ends when standard input closes."""
    content = secrets.token_bytes(NUM_BYTES)
    buffer = ctypes.create_string_buffer(content, NUM_BYTES)
    facts = {"pid": os.getpid(), "address": ctypes.addressof(buffer), "head": content[:16].hex()}
    print(json.dumps(facts), flush=True)
    sys.stdin.read()
    return {}


def cma_reader() -> dict[str, object]:
    """Reads a sibling's buffer with process_vm_readv, as UCX's CMA transport does."""
    pid, address = int(sys.argv[2]), int(sys.argv[3])
    try:
        return {"head": read_memory(pid, address, NUM_BYTES)[:16].hex()}
    except OSError as error:
        return {"error": error.strerror}


async def path_owner() -> dict[str, object]:
    """Stands for a kvstore: tells of its agent, and ends when standard input closes."""
    store = _small_transfer("doctor-store")
    agent = dataclasses.asdict(store.agent)
    print(json.dumps({**agent, "metadata": store.agent.metadata.hex()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    store.close()
    return {}


async def path_reader() -> dict[str, object]:
    """Stands for a worker: the path to that kvstore, and to one like it on another host."""
    from kv.transfer import Agent  # needs numpy, which a client's environment may lack

    store = Agent(**json.loads(sys.argv[2]))
    worker = _small_transfer("doctor-worker")
    elsewhere = dataclasses.replace(store, host_id="elsewhere", pid=0)
    paths = [choose("auto", worker.agent, agent) for agent in (store, elsewhere)]
    worker.close()
    return {"here": paths[0], "elsewhere": paths[1]}


def _small_transfer(role: str) -> NixlTransfer:
    import numpy as np

    from kv.nixl_transfer import NixlTransfer

    return NixlTransfer.create(
        role=role,
        incarnation=role,
        arena=np.zeros(4096, dtype=np.uint8),
        loop=asyncio.get_running_loop(),
    )


PROBES: dict[str, Callable[[], dict[str, object]]] = {
    "nixl": nixl,
    "torch": torch,
    "cma-owner": cma_owner,
    "cma-reader": cma_reader,
    "path-owner": lambda: asyncio.run(path_owner()),
    "path-reader": lambda: asyncio.run(path_reader()),
}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()), flush=True)
