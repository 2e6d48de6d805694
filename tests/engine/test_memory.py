"""The memory plan: sums, refusals with numbers, what is left for KV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.memory import DeviceMemory, MemoryNeeds, plan_memory, step_num_bytes, weights_num_bytes
from engine.quantisation import WeightFormat
from engine.weights import load_weights
from tests.support.tiny_models import make_tiny_model

GIB = 1 << 30
NEEDS = MemoryNeeds(weights=10 * GIB, workspace=2 * GIB, graphs=GIB)
CARD = DeviceMemory(total_num_bytes=80 * GIB, free_num_bytes=79 * GIB)
BLOCK: dict[str, Any] = {"block_num_bytes": 1 << 20, "block_tokens": 64}


def test_kv_gets_what_is_left_of_the_fraction() -> None:
    plan = plan_memory(NEEDS, **BLOCK, device=CARD, fraction=0.9)
    assert plan.num_blocks == (72 - 13) * 1024
    assert str(plan) == (
        "memory: weights 10.00 GiB, workspace 2.00 GiB, graphs 1.00 GiB, "
        "KV 59.00 GiB (60416 blocks, 3866624 tokens) of 72.00 GiB"
    )


def test_a_device_says_what_is_in_use() -> None:
    assert str(CARD) == "1.00 GiB of 80.00 GiB in use" and CARD.budget(0.5) == 40 * GIB
    assert CARD.budget(1.0) == 79 * GIB


def test_sizes_given_are_kept() -> None:
    plan = plan_memory(NEEDS, **BLOCK, device=CARD, kv_bytes=5 * (1 << 20) + 3)
    assert plan.num_blocks == 5 and plan.kv_num_bytes == 5 << 20
    assert plan_memory(NEEDS, **BLOCK, num_blocks=7).num_blocks == 7
    assert str(plan_memory(MemoryNeeds(weights=GIB), **BLOCK, num_blocks=1)) == (
        "memory: weights 1.00 GiB, KV 0.00 GiB (1 blocks, 64 tokens)"
    )


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    full = DeviceMemory(total_num_bytes=80 * GIB, free_num_bytes=12 * GIB)
    message = r"weights 10.00 GiB.*workspace 2.00.*graphs 1.00.*there is 12.00 GiB: .*90% of 80"
    with pytest.raises(ModelError, match=message):
        plan_memory(NEEDS, **BLOCK, device=full)
    with pytest.raises(ModelError, match=r"KV 60.00 GiB .*there is 72.00 GiB.* 1.00 GiB in use"):
        plan_memory(NEEDS, **BLOCK, device=CARD, kv_bytes=60 * GIB)
    with pytest.raises(ModelError, match="kv_bytes: 100;.*1048576 bytes"):
        plan_memory(NEEDS, **BLOCK, kv_bytes=100)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fraction 1\.5"):
        plan_memory(NEEDS, **BLOCK, device=CARD, fraction=1.5)
    with pytest.raises(ValueError, match="kv_bytes or num_blocks"):
        plan_memory(NEEDS, **BLOCK)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("weight_format", [WeightFormat.PLAIN, WeightFormat.CHANNEL])
def test_weights_are_counted_exactly(
    tmp_path: Path, weight_format: WeightFormat, family: str
) -> None:
    make_tiny_model(family, tmp_path, tie_word_embeddings=True)
    config, dtype = ModelConfig.load(tmp_path), torch.bfloat16
    parameters = load_weights(
        tmp_path,
        config,
        device=torch.device("cpu"),
        dtype=dtype,
        weight_format=weight_format,
        progress=lambda _: None,
    )
    assert config.tie_embeddings  # counted once
    distinct = {tensor.data_ptr(): tensor for tensor in parameters.values()}
    num_bytes = sum(tensor.nbytes for tensor in distinct.values())
    assert weights_num_bytes(config, weight_format, dtype) == num_bytes
    assert step_num_bytes(config, 2, 1, dtype) > 2 * 3 * config.intermediate_size * 2
