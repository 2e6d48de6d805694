"""Flags of the kvstore process. Owns names, defaults and limits; reads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.settings import ServiceSettings, parse_bytes, setting


@dataclass(frozen=True, kw_only=True)
class KvStoreSettings(ServiceSettings):
    """Flags of `python -m services.kvstore`."""

    drain_s: float = setting(
        2.0, group="process", help="seconds to let reads and writes end on SIGTERM", minimum=0
    )
    device: str = setting(
        "cpu",
        group="memory",
        help="where blocks are: DRAM (cpu) or a GPU's memory (cuda), as those of the workers",
        choices=("cpu", "cuda"),
    )
    kv_bytes: str = setting("256MiB", group="memory", help="memory for KV blocks, such as 2GiB")
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

    @property
    def arena_num_bytes(self) -> int:
        """`kv_bytes` as a number; ValueError names the flag, the value and the limit."""
        try:
            num_bytes = parse_bytes(self.kv_bytes)
        except ValueError as error:
            raise ValueError(f"--kv-bytes: {error}") from error
        if num_bytes < 1:
            raise ValueError(f"--kv-bytes: {self.kv_bytes!r} is below the least value, 1 byte")
        return num_bytes
