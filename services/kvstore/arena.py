"""The store's DRAM: one page-aligned mapping, and slots cut out of it.

Owns which byte ranges are slots; a slab belongs to one block size while any of its slots is used.
Never knows what a slot holds, never reads or writes the bytes.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SLOT_ALIGN = 64
MAX_SLAB_NUM_BYTES = 64 * 2**20
SLABS_PER_ARENA = 16


class DramArena:
    """Anonymous private memory, touched page by page as blocks arrive. `close` drops it.

    MemoryError when the kernel maps no such range.
    """

    tier = "dram"
    device_id = None

    def __init__(self, num_bytes: int) -> None:
        if num_bytes <= 0:
            raise ValueError(f"arena of {num_bytes} bytes; at least 1 is needed")
        pages = -(-num_bytes // mmap.PAGESIZE)
        try:
            self._mapping: mmap.mmap | None = mmap.mmap(
                -1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except OSError as error:
            raise MemoryError(f"arena of {num_bytes} bytes cannot be mapped: {error}") from error
        self.num_bytes = num_bytes
        self.memory = np.frombuffer(self._mapping, dtype=np.uint8)[:num_bytes]  # [num_bytes]

    @property
    def address(self) -> int:
        """Virtual address of the first byte."""
        return int(self.memory.ctypes.data)

    def make_current(self) -> None:
        """As HbmArena's: every thread may touch DRAM."""

    def close(self) -> None:
        """Lets go of the mapping; the kernel takes it when the last view is gone."""
        self.memory = np.empty(0, dtype=np.uint8)
        self._mapping = None


@dataclass(slots=True, kw_only=True)
class _Slab:
    """Slots of one size; a byte for each says whether it is used."""

    offset: int
    stride: int
    is_used: bytearray
    num_used: int = 0
    lowest: int = 0  # no slot before it is free

    @property
    def num_slots(self) -> int:
        return len(self.is_used)

    @property
    def num_bytes(self) -> int:
        return self.stride * self.num_slots

    @property
    def used(self) -> list[int]:
        """Offsets of used slots."""
        return [self.offset + n * self.stride for n, used in enumerate(self.is_used) if used]

    def take(self) -> int:
        place = self.is_used.index(0, self.lowest)
        self.is_used[place] = 1
        self.num_used += 1
        self.lowest = place + 1
        return self.offset + place * self.stride

    def give_back(self, offset: int) -> None:
        place, rest = divmod(offset - self.offset, self.stride)
        assert not rest and self.is_used[place], f"no slot is used at {offset}"
        self.is_used[place] = 0
        self.num_used -= 1
        self.lowest = min(self.lowest, place)


class SlotAllocator:
    """Slots of several sizes in [0, num_bytes), lowest offsets first to make long runs."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._slab_num_bytes = min(MAX_SLAB_NUM_BYTES, num_bytes // SLABS_PER_ARENA)
        self._extents: list[tuple[int, int]] = [(0, num_bytes)]  # sorted (offset, num_bytes)
        self._slabs: dict[int, _Slab] = {}
        self._starts: list[int] = []  # of slabs, sorted
        self._open: dict[int, dict[int, _Slab]] = {}  # stride -> slabs with a free slot
        self._latest_stride = 0  # 0 before the first slot

    def allocate(self, num_bytes: int) -> int | None:
        """Offset of a slot that holds num_bytes; None when there is no room."""
        stride = _stride(num_bytes)
        open_slabs = self._open.get(stride) or self._open_slab(stride)
        if not open_slabs:
            return None
        slab = next(iter(open_slabs.values()))
        offset = slab.take()
        self._latest_stride = stride
        if slab.num_used == slab.num_slots:
            del open_slabs[slab.offset]
        return offset

    def free(self, offset: int) -> None:
        """Gives a slot back; an empty slab returns its bytes for any size."""
        slab = self._slabs[self._starts[bisect.bisect(self._starts, offset) - 1]]
        slab.give_back(offset)
        open_slabs = self._open.setdefault(slab.stride, {})
        if slab.num_used:
            open_slabs[slab.offset] = slab
            return
        open_slabs.pop(slab.offset, None)
        if not open_slabs:
            del self._open[slab.stride]
        del self._slabs[slab.offset]
        self._starts.remove(slab.offset)
        self._return_extent(slab.offset, slab.num_bytes)

    def could_fit(self, num_bytes: int, is_evictable: Callable[[int], bool]) -> bool:
        """Whether a slot would fit if every slot that is_evictable (by offset) were freed."""
        stride = _stride(num_bytes)
        spans = list(self._extents)
        for slab in self._slabs.values():
            used = slab.used
            if slab.stride == stride and any(map(is_evictable, used)):
                return True
            if all(map(is_evictable, used)):
                spans.append((slab.offset, slab.num_bytes))
        run_end = run_num_bytes = 0
        for offset, length in sorted(spans):
            run_num_bytes = run_num_bytes + length if offset == run_end else length
            run_end = offset + length
            if run_num_bytes >= stride:
                return True
        return False

    @property
    def capacity(self) -> int:
        """Slots in all, free bytes counted in slots of the latest size; 0 before the first."""
        if not self._latest_stride:
            return 0
        in_slabs = sum(slab.num_slots for slab in self._slabs.values())
        return in_slabs + sum(length // self._latest_stride for _, length in self._extents)

    @property
    def used_offsets(self) -> set[int]:
        """Offsets of all slots in use."""
        return {offset for slab in self._slabs.values() for offset in slab.used}

    def check(self) -> None:
        """Asserts that slabs and free extents tile the arena and that slots are counted once."""
        spans = [*self._extents, *((s.offset, s.num_bytes) for s in self._slabs.values())]
        position = 0
        for offset, length in sorted(spans):
            assert offset == position and length > 0, f"hole or overlap at {position}"
            position = offset + length
        assert position == self.num_bytes, "slabs and extents do not cover the arena"
        for a, b in zip(self._extents, self._extents[1:], strict=False):
            assert a[0] + a[1] < b[0], "free extents not merged"
        assert sorted(self._slabs) == self._starts
        for slab in self._slabs.values():
            assert slab.num_used == sum(slab.is_used) > 0, "an empty slab was kept"
            assert all(slab.is_used[: slab.lowest]), "a free slot is never found"
            is_full = slab.num_used == slab.num_slots
            assert (slab.offset in self._open.get(slab.stride, {})) is not is_full

    def _open_slab(self, stride: int) -> dict[int, _Slab]:
        wanted = max(1, self._slab_num_bytes // stride) * stride
        fitting = [i for i, (_, length) in enumerate(self._extents) if length >= wanted]
        if fitting:
            chosen = fitting[0]
        else:
            chosen = max(range(len(self._extents)), key=lambda i: self._extents[i][1], default=-1)
            if chosen < 0 or self._extents[chosen][1] < stride:
                return {}
        offset, length = self._extents.pop(chosen)
        num_slots = min(wanted, length) // stride
        slab = _Slab(offset=offset, stride=stride, is_used=bytearray(num_slots))
        if length > slab.num_bytes:
            rest = (offset + slab.num_bytes, length - slab.num_bytes)
            bisect.insort(self._extents, rest)
        self._slabs[offset] = slab
        bisect.insort(self._starts, offset)
        self._open[stride] = {offset: slab}  # opened only when no slab of this stride has room
        return self._open[stride]

    def _return_extent(self, offset: int, num_bytes: int) -> None:
        at = bisect.bisect(self._extents, (offset, 0))
        if at < len(self._extents) and self._extents[at][0] == offset + num_bytes:
            num_bytes += self._extents.pop(at)[1]
        if at and sum(self._extents[at - 1]) == offset:
            at -= 1
            before = self._extents.pop(at)
            offset, num_bytes = before[0], before[1] + num_bytes
        self._extents.insert(at, (offset, num_bytes))


def _stride(num_bytes: int) -> int:
    return -(-num_bytes // SLOT_ALIGN) * SLOT_ALIGN
