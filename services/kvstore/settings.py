"""Flags of the kvstore process. Owns names, defaults and limits; reads nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.settings import ServiceSettings, setting


@dataclass(frozen=True, kw_only=True)
class KvStoreSettings(ServiceSettings):
    """Flags of `python -m services.kvstore`."""

    drain_s: float = setting(
        2.0, group="process", help="seconds to let reads and writes end on SIGTERM", minimum=0
    )
    kv_bytes: str = setting("256MiB", group="memory", help="DRAM for KV blocks, such as 2GiB")
    private_ttl_s: float = setting(
        120.0, group="lifetimes", help="seconds a private block waits for its reader", minimum=1
    )
    quarantine_s: float = setting(
        120.0,
        group="lifetimes",
        help="seconds until the silent writer of an expired reservation is presumed dead",
        minimum=1,
    )
    sweep_s: float = setting(
        1.0, group="lifetimes", help="seconds between sweeps of what has expired", minimum=0.01
    )
