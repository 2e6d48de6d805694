"""Flags of the kvstore process. Owns names, defaults and limits; reads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh.service_settings import ServiceSettings
from mesh.settings import parse_bytes, setting


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
    host_bytes: str = setting(
        "0",
        group="memory",
        help="with --device cuda: pinned DRAM for blocks that the GPU has no room for; 0 is none",
    )
    disk_dir: Path | None = setting(
        None,
        group="memory",
        help="directory of this store's own, for blocks that memory has no room for; it may "
        "hold those of a former life",
    )
    disk_bytes: str = setting("1GiB", group="memory", help="most bytes in --disk-dir")
    max_pinned: float = setting(
        0.5, group="memory", help="most of --kv-bytes that may be pinned", minimum=0, maximum=1
    )
    tenant_bytes: str = setting(
        "0", group="memory", help="most of --kv-bytes for the blocks of one tenant; 0: all of it"
    )
    watch_events: int = setting(
        65_536,
        group="watchers",
        help="changes that a watcher may be behind before it is told everything anew",
        minimum=1,
        maximum=2**24,
    )
    max_watchers: int = setting(64, group="watchers", help="watchers at a time", minimum=0)
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

    def __post_init__(self) -> None:
        """ValueError for flags that do not go together."""
        if self.host_num_bytes and self.device != "cuda":
            raise ValueError(
                f"--host-bytes {self.host_bytes}: needs --device cuda; with --device {self.device} "
                "blocks are in DRAM anyway (--kv-bytes)"
            )

    @property
    def arena_num_bytes(self) -> int:
        """`kv_bytes` as a number; ValueError names the flag, the value and the limit."""
        return _num_bytes("--kv-bytes", self.kv_bytes)

    @property
    def host_num_bytes(self) -> int:
        """`host_bytes` as a number, 0 for none; ValueError as above."""
        return _num_bytes("--host-bytes", self.host_bytes, minimum=0)

    @property
    def disk_num_bytes(self) -> int:
        """`disk_bytes` as a number, 0 without a directory; ValueError as above."""
        return 0 if self.disk_dir is None else _num_bytes("--disk-bytes", self.disk_bytes)

    @property
    def tenant_num_bytes(self) -> int:
        """`tenant_bytes` as a number, 0 for no limit; ValueError as above."""
        return _num_bytes("--tenant-bytes", self.tenant_bytes, minimum=0)


def _num_bytes(flag: str, text: str, minimum: int = 1) -> int:
    try:
        num_bytes = parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    if num_bytes < minimum:
        raise ValueError(f"{flag}: {text!r} is below the least value, {minimum} byte")
    return num_bytes
