"""Questions about this machine that `kvmesh doctor` asks in child processes, as one JSON line each.

`python -m kvmesh.probes NAME`: a probe may crash (native libraries do) without taking the doctor
along. Owns no judgement: it reports facts.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import secrets
import sys
from collections.abc import Callable

NUM_BYTES = 2**20


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


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
    buffer = ctypes.create_string_buffer(NUM_BYTES)
    local = _IoVec(ctypes.addressof(buffer), NUM_BYTES)
    remote = _IoVec(address, NUM_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    count = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if count != NUM_BYTES:
        return {"error": os.strerror(ctypes.get_errno())}
    return {"head": buffer.raw[:16].hex()}


PROBES: dict[str, Callable[[], dict[str, object]]] = {
    "nixl": nixl,
    "torch": torch,
    "cma-owner": cma_owner,
    "cma-reader": cma_reader,
}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()), flush=True)
