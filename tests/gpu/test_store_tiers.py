"""A store on a GPU, with pinned DRAM and a disk behind its arena: the bytes return."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from kv.digest import block_digest
from mesh.telemetry import Telemetry
from services.kvstore.arena import SlotAllocator
from services.kvstore.copies import Span
from services.kvstore.cuda_copies import CudaEngine
from services.kvstore.disk_copies import BounceWindow
from services.kvstore.disk_files import DiskFiles
from services.kvstore.disk_format import file_num_bytes
from services.kvstore.hbm import HbmArena
from services.kvstore.host_copies import HostCopies
from services.kvstore.index import BlockIndex
from services.kvstore.mover import Mover
from services.kvstore.pinned import PinnedMemory
from tests.support.generate import generate, greedy_request
from tests.support.mesh import Mesh, running_mesh

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
SIZE = 9 * 2**20
NUM_SLOTS, NUM_HOST, NUM_FILES = 16, 24, 64
PATIENCE_S = 60.0
KEYS = [number.to_bytes(32, "big") for number in range(48)]


class Store:
    """Index, arena, tiers and mover, without the wire."""

    def __init__(self, directory: Path) -> None:
        self.arena = HbmArena(NUM_SLOTS * SIZE)
        self.engine = CudaEngine(self.arena)
        self.pinned = PinnedMemory(self.arena, NUM_HOST * SIZE)
        self.files = DiskFiles(directory)
        self.index = BlockIndex(
            SlotAllocator(self.arena.num_bytes),
            clock=time.monotonic,
            host_num_bytes=self.pinned.num_bytes,
            disk_num_bytes=NUM_FILES * file_num_bytes(SIZE),
        )
        self.mover = Mover(
            index=self.index,
            arena_num_bytes=self.arena.num_bytes,
            telemetry=Telemetry.off(),
        )
        self.mover.add_host(HostCopies(self.engine, self.pinned.address))

    async def close(self) -> None:
        await self.mover.close()
        await asyncio.sleep(0)
        self.index.check()
        self.pinned.close()
        self.engine.close()
        self.arena.close()

    async def put(self, keys: list[bytes]) -> None:
        """Writes and seals blocks, and waits until they are below."""
        answers = self.index.reserve("w", keys, SIZE, ttl_s=PATIENCE_S)
        digests: list[int] = []
        for key, answer in zip(keys, answers, strict=True):
            content = content_of(key)
            self.engine.write([Span(answer.offset, int(content.ctypes.data), SIZE)])
            digests.append(block_digest(memoryview(content)))  # pyright: ignore[reportArgumentType]
        assert all(self.index.seal("w", [a.reservation_id for a in answers], digests))
        self.mover.wake()
        deadline = time.monotonic() + PATIENCE_S
        num_pending = self.num_pending
        while num_pending:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
            num_pending = self.num_pending

    async def check(self, keys: list[bytes]) -> None:
        """Looks blocks up and compares every byte, in the GPU's memory."""
        leased = await self.mover.lookup("r", keys, SIZE, ttl_s=PATIENCE_S, max_wait_s=PATIENCE_S)
        assert len(leased.offsets) == len(keys)
        for key, block in zip(keys, leased.blocks, strict=True):
            back = np.zeros(SIZE, np.uint8)
            self.engine.read([Span(block.offset, int(back.ctypes.data), SIZE)])
            assert np.array_equal(back, content_of(key))
            assert block_digest(memoryview(back)) == block.digest  # pyright: ignore[reportArgumentType]
        self.index.release("r", leased.lease_id)

    @property
    def num_pending(self) -> int:
        return sum(tier.num_pending for tier in self.index.lower.all)

    def num_in(self, keys: list[bytes]) -> tuple[int, int]:
        """Of the keys, how many DRAM has and how many the disk has."""
        rows = self.index._blocks.find(keys)
        in_host, on_disk = (int(tier.have(rows).sum()) for tier in self.index.lower.all)
        return in_host, on_disk


def content_of(key: bytes) -> np.ndarray:
    return np.random.default_rng(list(key)).integers(0, 256, SIZE, np.uint8)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(tmp_path)
    await made.mover.load_disk(made.files, BounceWindow(made.engine))
    yield made
    await made.close()


async def test_blocks_return_from_dram(store: Store) -> None:
    for first in range(0, 24, 8):
        await store.put(KEYS[first : first + 8])
    assert store.num_in(KEYS[:24]) == (24, 24)
    assert store.index.evict(NUM_SLOTS) == NUM_SLOTS
    for path in store.files.directory.glob("*.kv"):
        path.unlink()  # so that only DRAM has them
    for first in (16, 0, 8):
        await store.check(KEYS[first : first + 8])


async def test_blocks_return_from_disk(store: Store) -> None:
    for first in range(0, 48, 8):
        await store.put(KEYS[first : first + 8])
    assert store.num_in(KEYS[:8]) == (0, 8), "DRAM has room for three of six"
    assert store.index.evict(NUM_SLOTS) == NUM_SLOTS
    await store.check(KEYS[:8])
    await store.check(KEYS[40:])


async def test_a_flipped_bit_on_disk_never_reaches_the_arena(store: Store) -> None:
    for first in range(0, 48, 8):
        await store.put(KEYS[first : first + 8])
    assert store.index.evict(NUM_SLOTS) == NUM_SLOTS
    path = store.files.directory / f"{KEYS[2].hex()}.kv"
    data = bytearray(path.read_bytes())
    data[100_000] ^= 1
    path.write_bytes(data)
    leased = await store.mover.lookup("r", KEYS[:8], SIZE, ttl_s=1, max_wait_s=PATIENCE_S)
    assert len(leased.offsets) == 2
    store.index.release("r", leased.lease_id)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A store with 8 slots of 192 KiB on the GPU, 16 in DRAM, and a disk."""
    directory = tmp_path_factory.mktemp("disk")
    flags = ("--device", "cuda", "--host-bytes", "3MiB", "--disk-dir", str(directory))
    workers = ("--device", "cuda", "--max-batch", "16", "--chunk-tokens", "256")
    with running_mesh(DEMO, worker_flags=workers, store_bytes="1536KiB", store_flags=flags) as made:
        yield made


def test_prefixes_return_from_below_to_a_mesh_on_a_gpu(mesh: Mesh) -> None:
    rng = random.Random(5)
    requests = [greedy_request([rng.randrange(3, 2000) for _ in range(200)], 8) for _ in range(10)]
    tokens: list[list[int]] = []
    for number, request in enumerate(requests, 1):
        tokens.append(generate(mesh, request).tokens[0])
        mesh.wait_until(lambda n=number: _on_disk(mesh) >= 3 * n, "blocks reach the disk")
    for request, expected in [*zip(requests, tokens, strict=True)] * 2:
        answer = generate(mesh, request)
        assert answer.tokens[0] == expected
        assert answer.usage is not None and answer.usage.num_cached_tokens == 192
    counts = mesh.status(mesh.kvstores[0].address).counts
    assert 0 < counts.num_blocks_in_host <= 16 and counts.num_blocks_on_disk == 30


def _on_disk(mesh: Mesh) -> int:
    return mesh.status(mesh.kvstores[0].address).counts.num_blocks_on_disk
