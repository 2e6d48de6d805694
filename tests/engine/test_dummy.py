"""Random weights: those of a checkpoint in name, shape and type, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from engine.config import ModelConfig
from engine.dummy import dummy_weights, dummy_weights_id
from engine.quantisation import WeightFormat
from engine.weights import Parameters, allocate
from tests.support.tiny_models import make_tiny_model

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A model whose sizes are multiples of 128."""
    path = tmp_path_factory.mktemp("dummy")
    make_tiny_model("qwen2", path, hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    return ModelConfig.load(path)


@pytest.fixture(scope="module")
def sparse_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A mixture of experts whose sizes are multiples of 128."""
    path = tmp_path_factory.mktemp("dummy-experts")
    make_tiny_model("mixtral", path, hidden_size=128, num_attention_heads=2, head_dim=64)
    return ModelConfig.load(path)


@pytest.fixture(scope="module")
def latent_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """MLA and experts."""
    path = tmp_path_factory.mktemp("dummy-latent")
    make_tiny_model("deepseek_v3", path, hidden_size=128, moe_intermediate_size=128)
    return ModelConfig.load(path)


def make(config: ModelConfig, weight_format: WeightFormat, seed: int = 0) -> Parameters:
    return dummy_weights(config, device=CPU, dtype=BF16, weight_format=weight_format, seed=seed)


@pytest.mark.parametrize("weight_format", WeightFormat)
@pytest.mark.parametrize("kind", ["config", "sparse_config", "latent_config"])
def test_every_parameter_is_there_and_finite(
    request: pytest.FixtureRequest, kind: str, weight_format: WeightFormat
) -> None:
    config = request.getfixturevalue(kind)
    made = make(config, weight_format)
    expected, _ = allocate(config, weight_format, device=CPU, dtype=BF16)
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
        assert tensor.float().isfinite().all() and tensor.float().any(), name


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_projections_keep_activations_near_unit_size(
    config: ModelConfig, weight_format: WeightFormat
) -> None:
    made = make(config, weight_format)
    weight, scale = made["layers.0.gate_up"].float(), made.get("layers.0.gate_up.scale")
    if scale is not None and scale.dim() == 2:
        weight *= scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    elif scale is not None:
        weight *= scale[:, None]
    assert 0.7 < (torch.randn(64, 128) @ weight.t()).std() < 1.4


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_experts_keep_activations_near_unit_size(
    sparse_config: ModelConfig, weight_format: WeightFormat
) -> None:
    made = make(sparse_config, weight_format)
    name = "layers.1.experts_gate_up"
    weights, scales = made[name].float(), made.get(f"{name}.scale")
    if scales is not None and scales.dim() == 3:
        weights *= scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
    elif scales is not None:
        weights *= scales[..., None]
    x = torch.randn(64, 128)
    for weight in weights:
        assert 0.7 < (x @ weight.t()).std() < 1.4
    assert not torch.equal(weights[0], weights[1])


def test_the_seed_decides(config: ModelConfig) -> None:
    one, same = make(config, WeightFormat.CHANNEL), make(config, WeightFormat.CHANNEL)
    other = make(config, WeightFormat.CHANNEL, seed=1)
    bits = [[t.view(torch.uint8) for t in made.values()] for made in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(bits[0], bits[1], strict=True))
    assert not torch.equal(bits[0][0], bits[2][0])


def test_seed_and_kind_of_device_name_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "NVIDIA H100"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"{name} of {device.type}")
    gpu = torch.device("cuda")
    names = {dummy_weights_id(CPU), dummy_weights_id(CPU, seed=1), dummy_weights_id(gpu)}
    assert dummy_weights_id(torch.device("cpu")) in names
    assert dummy_weights_id(torch.device("cuda", 1)) in names
    name = "NVIDIA L4"
    assert len({*names, dummy_weights_id(gpu)}) == 4
