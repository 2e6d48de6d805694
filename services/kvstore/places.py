"""Where this process keeps blocks: the arena, pinned memory behind a GPU's, a directory.

Owns them from start to end, and what is said when the machine does not have them.
"""

from __future__ import annotations

import os

from mesh.process import StartupError
from mesh.telemetry import Telemetry
from services.kvstore.arena import DramArena
from services.kvstore.cuda_copies import CudaEngine
from services.kvstore.disk_copies import BounceWindow, DirectWindow, Window
from services.kvstore.disk_files import DiskFiles
from services.kvstore.hbm import HbmArena
from services.kvstore.host_copies import HostCopies
from services.kvstore.index import BlockIndex
from services.kvstore.mover import Mover
from services.kvstore.pinned import PinnedMemory
from services.kvstore.settings import KvStoreSettings


class Places:
    """What the settings ask for; StartupError names the flag that cannot be had."""

    def __init__(self, settings: KvStoreSettings) -> None:
        self._settings = settings
        self.arena = _open_arena(settings)
        self._engine = CudaEngine(self.arena) if isinstance(self.arena, HbmArena) else None
        self._pinned = _open_pinned(settings, self.arena)

    async def open_mover(self, index: BlockIndex, telemetry: Telemetry) -> Mover | None:
        """Fills lower tiers with what a former life left; None without any."""
        directory = self._settings.disk_dir
        if self._pinned is None and directory is None:
            return None
        mover = Mover(index=index, arena_num_bytes=self.arena.num_bytes, telemetry=telemetry)
        if self._pinned is not None:
            assert self._engine is not None  # the settings see to it
            mover.add_host(HostCopies(self._engine, self._pinned.address))
        if directory is not None:
            try:
                await mover.load_disk(DiskFiles(directory), self._window())
            except OSError as error:
                raise StartupError(f"--disk-dir {directory}: {error}") from error
        return mover

    def close(self) -> None:
        """Frees all memory, after the mover and whatever else moves bytes."""
        if self._pinned is not None:
            self._pinned.close()
        if self._engine is not None:
            self._engine.close()
        self.arena.close()

    def _window(self) -> Window:
        if isinstance(self.arena, DramArena):
            return DirectWindow(self.arena.memory)
        assert self._engine is not None
        return BounceWindow(self._engine)


def _open_arena(settings: KvStoreSettings) -> DramArena | HbmArena:
    try:
        num_bytes = settings.arena_num_bytes
        return HbmArena(num_bytes) if settings.device == "cuda" else _map_dram(num_bytes)
    except MemoryError as error:
        raise StartupError(f"--kv-bytes {settings.kv_bytes}: {error}") from error
    except RuntimeError as error:
        raise StartupError(f"--device {settings.device}: {error}") from error


def _open_pinned(settings: KvStoreSettings, arena: DramArena | HbmArena) -> PinnedMemory | None:
    num_bytes, limit = settings.host_num_bytes, _memory_num_bytes()
    if not num_bytes or isinstance(arena, DramArena):
        return None
    try:
        if num_bytes > limit:
            raise RuntimeError(f"{num_bytes} bytes")
        return PinnedMemory(arena, num_bytes)
    except RuntimeError as error:
        reason = f"--host-bytes {settings.host_bytes}: {error}"
        raise StartupError(f"{reason}; this machine has {limit} bytes of memory") from error


def _map_dram(num_bytes: int) -> DramArena:
    """MemoryError with the machine's size when it does not fit."""
    limit = _memory_num_bytes()
    try:
        if num_bytes <= limit:
            return DramArena(num_bytes)
        reason = f"{num_bytes} bytes"
    except MemoryError as error:
        reason = str(error)
    raise MemoryError(f"{reason}; this machine has {limit} bytes of memory")


def _memory_num_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
