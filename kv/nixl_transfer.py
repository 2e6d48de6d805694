"""Transfers over NIXL: the only file that imports it and knows its habits (DESIGN section 5).

Owns one agent, its registered arena and its peers' metadata. Every NIXL call runs in the owner
thread. No pickle and no notifications: what crosses is metadata, as bytes, and memory. Variables of
UCX are set, unless the user did, before the library is loaded: it reads them once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from kv.errors import TransferError
from kv.path import one_sided
from kv.thread_transfer import PART_NUM_BYTES, ThreadTransfer
from kv.transfer import Agent, Offsets, Spans
from kv.transfer_thread import TransferThread

log = logging.getLogger("kvmesh.transfer")

Arena = tuple[int, int] | np.ndarray[Any, Any]

_ENVIRONMENT = {
    "UCX_TLS": "all",
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "y",
    "UCX_TCP_CONN_NB": "y",
    "UCX_TCP_SYN_CNT": "2",
    "UCX_TCP_USER_TIMEOUT": "5s",
    "UCX_TCP_KEEPIDLE": "3s",
    "UCX_TCP_KEEPINTVL": "1s",
    "UCX_TCP_KEEPCNT": "3",
    "UCX_TCP_TX_SEG_SIZE": "64K",
    "UCX_TCP_RX_SEG_SIZE": "64K",
    "UCX_MEM_MMAP_HOOK_MODE": "none",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_LOG_FILE": "stderr",  # stdout carries the readiness line
    "NIXL_LOG_LEVEL": "ERROR",
}
_PROGRESS_DELAY_US = 10_000
# At 800 GB/s between device memories: as long as waiting for two parts would take.
_DEVICE_PART_NUM_BYTES = 512 * 2**20
_patch_lock = threading.Lock()


class NixlTransfer(ThreadTransfer):
    """The Transfer protocol over one NIXL agent. Make it with `create`, after any fork."""

    @classmethod
    def create(
        cls,
        *,
        role: str,
        incarnation: str,
        arena: Arena,
        loop: asyncio.AbstractEventLoop,
        device_id: int | None = None,
        on_thread_start: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> NixlTransfer:
        """Starts the agent and registers the arena; blocks about 0.5 s (1.4 s with a GPU).
        `arena` is (address, num_bytes), kept alive by the caller, or a numpy buffer, kept here.
        With `device_id` it is GPU memory; `on_thread_start` then sets the device in the thread.
        `environment` adds UCX variables, such as UCX_NET_DEVICES; the user's own still win.
        RuntimeError: NIXL is missing or has no UCX backend.
        """
        nixl, nixl_version, variables = _load({**_ENVIRONMENT, **(environment or {})})
        name = f"{role}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        backend = _NixlBackend(nixl, arena, device_id)

        def make() -> _NixlBackend:
            if on_thread_start is not None:
                on_thread_start()
            backend.open(name)
            return backend

        thread = TransferThread(make)
        thread.start()
        agent = backend.agent(name, nixl_version, incarnation, variables["UCX_TLS"])
        part = PART_NUM_BYTES if device_id is None else _DEVICE_PART_NUM_BYTES
        return cls(agent=agent, backend=backend, thread=thread, loop=loop, part_num_bytes=part)


class _NixlBackend:
    """One NIXL agent; all methods run in the owner thread."""

    def __init__(self, nixl: Any, arena: Arena, device_id: int | None) -> None:
        self._nixl = nixl
        self._keep = arena
        self._memory = "DRAM" if device_id is None else "VRAM"
        self._device_id = device_id or 0
        if isinstance(arena, np.ndarray):
            if not arena.flags.c_contiguous:
                raise ValueError("arena: not contiguous")
            arena = (arena.ctypes.data, arena.nbytes)
        self.arena_address, self.arena_num_bytes = arena
        self.metadata = b""
        self._name = ctypes.create_string_buffer(0)
        self._agent: Any = None
        self._registered: Any = None
        self._peers: dict[str, Agent] = {}
        self._stuck: list[Any] = []
        self._failures = _failures(nixl)

    def agent(self, name: str, nixl_version: str, incarnation: str, tls: str) -> Agent:
        """What peers are told of an agent that is open; tls: UCX_TLS, the transports it may use."""
        return Agent(
            name=name,
            nixl_version=nixl_version,
            metadata=self.metadata,
            arena_address=self.arena_address,
            arena_num_bytes=self.arena_num_bytes,
            incarnation=incarnation,
            host_id=_host_id(),
            pid=os.getpid(),
            name_address=ctypes.addressof(self._name),
            transports=one_sided(tls, is_on_gpu=self._memory == "VRAM"),
        )

    def open(self, name: str) -> None:
        """Makes the agent with a progress thread that sleeps, and registers the whole arena."""
        config = self._nixl.nixl_agent_config(
            enable_prog_thread=True,
            backends=["UCX"],
            sync_mode=self._nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        with _progress_delay(self._nixl):
            self._agent = self._nixl.nixl_agent(name, config)
        if "UCX" not in self._agent.backends:
            raise RuntimeError(
                "NIXL has no UCX backend: reinstall nixl-cu13 (its plugins are missing)"
            )
        arena = np.array([[self.arena_address, self.arena_num_bytes, self._device_id]], np.uint64)
        self._registered = self._agent.register_memory(arena, self._memory)
        self.metadata = self._agent.get_agent_metadata()
        self._name = ctypes.create_string_buffer(name.encode())

    def add_peer(self, agent: Agent) -> None:
        """Loads a peer's metadata; its name must be the one the peer gave."""
        with self._guard(agent.name):
            name = self._agent.add_remote_agent(agent.metadata)
        if isinstance(name, bytes):
            name = name.decode()
        if name != agent.name:
            self._agent.remove_remote_agent(name)
            raise TransferError(agent.name, f"its metadata is that of {name!r}")
        self._peers[name] = agent

    def remove_peer(self, name: str) -> None:
        """Drops a peer; requests to it then fail."""
        if self._peers.pop(name, None) is not None:
            with self._guard(name):
                self._agent.remove_remote_agent(name)

    def post(self, operation: str, peer: str, part: Spans) -> object:
        """Starts one request. Over shared memory (CMA) the bytes are copied inside this call."""
        agent = self._peers.get(peer)
        if agent is None:
            raise TransferError(peer, "not connected")
        local = self._rows(self.arena_address, part.local_offsets, part.lengths)
        remote = self._rows(agent.arena_address, part.remote_offsets, part.lengths)
        with self._guard(peer):
            handle = self._agent.initialize_xfer(operation, local, remote, peer)
        try:
            with self._guard(peer):
                self._agent.transfer(handle)
        except TransferError:
            self.release(handle)
            raise
        return handle

    def is_done(self, peer: str, handle: object) -> bool:
        """Polls once."""
        with self._guard(peer):
            return self._agent.check_xfer_state(handle) == "DONE"

    def release(self, handle: object) -> None:
        """Frees a request; one that NIXL will not let go is kept until the agent ends."""
        try:
            self._agent.release_xfer_handle(handle)
        except self._failures:
            self._stuck.append(handle)

    def drain(self) -> None:
        """Drops notifications: nobody here sends any."""
        self._agent.get_new_notifs()

    def close(self) -> None:
        """Destroys the agent; what was stuck ends with it."""
        for name in list(self._peers):
            with contextlib.suppress(TransferError):
                self.remove_peer(name)
        with contextlib.suppress(*self._failures):
            self._agent.deregister_memory(self._registered)
        self._stuck.clear()
        self._agent = None

    def _rows(self, base: int, offsets: Offsets, lengths: Offsets) -> Any:
        """Descriptor list of N x 3 (address, length, device) rows."""
        rows = np.empty((len(offsets), 3), dtype=np.uint64)
        rows[:, 0] = offsets + np.uint64(base)
        rows[:, 1] = lengths
        rows[:, 2] = self._device_id
        return self._agent.get_xfer_descs(rows, self._memory)

    @contextlib.contextmanager
    def _guard(self, peer: str) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            reason = type(error).__name__.removeprefix("nixl").removesuffix("Error")
            raise TransferError(peer, f"NIXL {reason}: {error}") from error


def _load(environment: Mapping[str, str]) -> tuple[Any, str, dict[str, str]]:
    """The library, its version and the variables as they are now; its logs go where all logs go,
    not to stdout.
    """
    variables = {name: os.environ.setdefault(name, value) for name, value in environment.items()}
    raise_exceptions = logging.raiseExceptions
    for module in ("nixl_cu13", "nixl"):
        try:
            nixl = importlib.import_module(module)
            nixl_version = version(module.replace("_", "-"))
            break
        except (ImportError, PackageNotFoundError) as error:
            log.debug("%s: %s", module, error)
    else:
        raise RuntimeError("NIXL is missing: pip install --no-deps nixl-cu13==1.5.1")
    logging.raiseExceptions = raise_exceptions
    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    return nixl, nixl_version, variables


def _bindings(nixl: Any) -> Any:
    return importlib.import_module(f"{nixl.__name__}._bindings")


def _failures(nixl: Any) -> tuple[type[Exception], ...]:
    """The library's exception types; they share no base but Exception."""
    values = vars(_bindings(nixl)).values()
    return tuple(v for v in values if isinstance(v, type) and issubclass(v, Exception))


@contextlib.contextmanager
def _progress_delay(nixl: Any) -> Iterator[None]:
    """Lets the progress thread sleep 10 ms between rounds; the stock wrapper has it spin."""
    bindings = _bindings(nixl)
    make = bindings.nixlAgent

    def make_with_delay(name: str, config: Any) -> Any:
        config.pthrDelay = _PROGRESS_DELAY_US
        return make(name, config)

    with _patch_lock:
        bindings.nixlAgent = make_with_delay
        try:
            yield
        finally:
            bindings.nixlAgent = make


def _host_id() -> str:
    """Host name and boot, as mesh.process.host_id: equal ids can share memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}:{boot.read_text().strip() if boot.exists() else ''}"
