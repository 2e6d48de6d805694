"""What a worker tells of its present state whenever metrics are exported."""

from __future__ import annotations

from collections import Counter

import torch

from engine.engine import Engine
from mesh.kvstore_client import KvStoreClient
from mesh.telemetry import Telemetry

STORE_STATES = ("connecting", "up", "down", "leaving")


def observe_worker(
    telemetry: Telemetry, engine: Engine, store: KvStoreClient, device: torch.device
) -> None:
    """Registers sequences, stores, and memory and use of the GPU where `device` is one."""

    def sequences() -> list[tuple[int, dict[str, str]]]:
        return [
            (engine.num_running, {"state": "running"}),
            (engine.num_waiting, {"state": "waiting"}),
        ]

    def stores() -> list[tuple[int, dict[str, str]]]:
        counts = Counter(store.states.values())
        return [(counts[state], {"role": "kvstore", "state": state}) for state in STORE_STATES]

    telemetry.observe("sequences", sequences)
    telemetry.observe("peer_state", stores)
    if device.type == "cuda":
        _observe_gpu(telemetry, device)


def _observe_gpu(telemetry: Telemetry, device: torch.device) -> None:
    def memory() -> list[tuple[int, dict[str, str]]]:
        num_free, num_bytes = torch.cuda.mem_get_info(device)
        return [(num_free, {"state": "free"}), (num_bytes - num_free, {"state": "used"})]

    def utilization() -> list[tuple[float, dict[str, str]]]:
        try:
            return [(torch.cuda.utilization(device) / 100, {})]
        except (ImportError, ModuleNotFoundError, RuntimeError):
            return []  # nvidia-ml-py is not installed, or the driver does not tell

    telemetry.observe("gpu_memory", memory)
    telemetry.observe("gpu_utilization", utilization)
