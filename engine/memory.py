"""The plan of a device's memory: weights, KV blocks, graphs, workspace.

Owns the arithmetic and the sentences that refuse what does not fit. Never allocates; what the
device has is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.quantisation import WeightFormat
from engine.weights import allocate

DEFAULT_FRACTION = 0.90
_GIB = 1 << 30
# A captured step keeps its kernels' parameters; seen with 40 graphs of 36 layers: about 0.3 GiB.
_GRAPH_NUM_BYTES = 8 << 20
# Modules of compiled kernels and what libraries keep for themselves.
_LIBRARY_NUM_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What a device has: total_num_bytes, and free_num_bytes before anything is loaded."""

    total_num_bytes: int
    free_num_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        """Asks a CUDA device."""
        free, total = torch.cuda.mem_get_info(device)
        return cls(total_num_bytes=total, free_num_bytes=free)

    def __str__(self) -> str:
        used = self.total_num_bytes - self.free_num_bytes
        return f"{gib(used)} of {gib(self.total_num_bytes)} in use"

    def budget(self, fraction: float) -> int:
        """Bytes that a process may take: this fraction of all, and no more than is free."""
        return min(int(self.total_num_bytes * fraction), self.free_num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """Bytes that a runner takes besides KV blocks."""

    weights: int
    workspace: int = 0
    graphs: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.workspace + self.graphs


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What goes where; `block_num_bytes` per KV block, budget_num_bytes None without a limit."""

    needs: MemoryNeeds
    num_blocks: int
    block_num_bytes: int
    block_tokens: int
    budget_num_bytes: int | None = None

    @property
    def kv_num_bytes(self) -> int:
        """Bytes of all KV blocks."""
        return self.num_blocks * self.block_num_bytes

    def __str__(self) -> str:
        needs = self.needs
        text = f"memory: weights {gib(needs.weights)}"
        if needs.workspace or needs.graphs:
            text += f", workspace {gib(needs.workspace)}, graphs {gib(needs.graphs)}"
        text += (
            f", KV {gib(self.kv_num_bytes)} ({self.num_blocks} blocks, "
            f"{self.num_blocks * self.block_tokens} tokens)"
        )
        if self.budget_num_bytes is not None:
            text += f" of {gib(self.budget_num_bytes)}"
        return text


def plan_memory(
    needs: MemoryNeeds,
    *,
    block_num_bytes: int,
    block_tokens: int,
    kv_bytes: int | None = None,
    num_blocks: int | None = None,
    device: DeviceMemory | None = None,
    fraction: float = DEFAULT_FRACTION,
) -> MemoryPlan:
    """How many blocks fit: num_blocks or kv_bytes as given, else what is left of the device.

    fraction: of the device's total memory, for this process alone: processes that share a device
    share it by their fractions, whichever starts first. ModelError, with the numbers, when that is
    not enough; ValueError when neither size nor device is given.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"memory fraction {fraction}: more than 0, at most 1")
    budget = None if device is None else device.budget(fraction)
    if num_blocks is None:
        if kv_bytes is None:
            if budget is None:
                raise ValueError("kv_bytes or num_blocks must be given")
            kv_bytes = budget - needs.total
        elif kv_bytes < block_num_bytes:
            raise ModelError(
                f"kv_bytes: {kv_bytes}; one block of {block_tokens} tokens takes "
                f"{block_num_bytes} bytes"
            )
        num_blocks = max(1, kv_bytes // block_num_bytes)
    plan = MemoryPlan(
        needs=needs,
        num_blocks=num_blocks,
        block_num_bytes=block_num_bytes,
        block_tokens=block_tokens,
        budget_num_bytes=budget,
    )
    if device is not None and needs.total + plan.kv_num_bytes > device.budget(fraction):
        raise ModelError(_too_little(plan, device, fraction))
    return plan


def weights_num_bytes(config: ModelConfig, weight_format: WeightFormat, dtype: torch.dtype) -> int:
    """Bytes of all parameters."""
    parameters, _ = allocate(config, weight_format, device=torch.device("meta"), dtype=dtype)
    distinct = {id(tensor): tensor for tensor in parameters.values()}
    return sum(tensor.numel() * tensor.itemsize for tensor in distinct.values())


def step_num_bytes(config: ModelConfig, num_rows: int, num_sampled: int, dtype: torch.dtype) -> int:
    """Most bytes of a step's activations: num_rows tokens, num_sampled rows of fp32 logits.

    Counts every tensor of a layer as if none was freed before the next one is made.
    """
    qkv = config.q_size + 2 * config.kv_size
    inner, moe = 3 * config.intermediate_size, config.moe
    if moe is not None:  # every expert of a token has its own rows
        experts = moe.routing.top_k * (2 * config.hidden_size + 3 * moe.intermediate_size)
        inner = max(inner, experts + 3 * moe.shared_size)
    wide = 4 * config.hidden_size + qkv + 2 * config.q_size + inner
    return num_rows * wide * dtype.itemsize + num_sampled * config.vocab_size * 12


def graphs_num_bytes(num_graphs: int) -> int:
    """Bytes of captured steps, their activations (which share the workspace) excluded."""
    return num_graphs * _GRAPH_NUM_BYTES + _LIBRARY_NUM_BYTES


def gib(num_bytes: int) -> str:
    """Readable: "15.27 GiB"."""
    return f"{num_bytes / _GIB:.2f} GiB"


def _too_little(plan: MemoryPlan, device: DeviceMemory, fraction: float) -> str:
    needs, taken = plan.needs, device.total_num_bytes - device.free_num_bytes
    return (
        f"too little memory: weights {gib(needs.weights)} + workspace {gib(needs.workspace)} + "
        f"graphs {gib(needs.graphs)} + KV {gib(plan.kv_num_bytes)} ({plan.num_blocks} blocks of "
        f"{plan.block_num_bytes} bytes) = {gib(needs.total + plan.kv_num_bytes)}; there is "
        f"{gib(plan.budget_num_bytes or 0)}: the less of {fraction:.0%} of "
        f"{gib(device.total_num_bytes)} and what {gib(taken)} in use leave"
    )
