"""FP8 weights: quantised at load, ready-made per channel and in blocks, refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.quantisation import FP8, WeightFormat
from engine.weights import Parameters, load_weights
from tests.support.fp8_models import (
    BLOCK_CONFIG,
    CHANNEL_CONFIG,
    make_block_checkpoint,
    make_channel_checkpoint,
    set_config,
)
from tests.support.tiny_models import make_tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose projections have whole blocks."""
    path = tmp_path_factory.mktemp("fp8") / "plain"
    make_tiny_model("qwen3", path, **SIZES)
    return path


def load(path: Path, weight_format: WeightFormat) -> Parameters:
    return load_weights(
        path,
        ModelConfig.load(path),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        weight_format=weight_format,
        progress=lambda _: None,
    )


def dequantised(parameters: Parameters, name: str) -> torch.Tensor:
    values, scale = parameters[name].float(), parameters[f"{name}.scale"]
    if scale.dim() == 1:
        return values * scale[:, None]
    return values * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


def test_quantising_at_load_keeps_three_bits_of_every_weight(plain: Path) -> None:
    exact, rounded = load(plain, WeightFormat.PLAIN), load(plain, WeightFormat.CHANNEL)
    for name in ("qkv", "o", "gate_up", "down"):
        wide = exact[f"layers.1.{name}"].float()
        close = dequantised(rounded, f"layers.1.{name}")
        assert rounded[f"layers.1.{name}"].dtype == FP8
        # Half a unit of a 3-bit mantissa; near zero, of the smallest subnormal.
        smallest = wide.abs().amax(1, keepdim=True) / 448 * 2**-9
        assert ((close - wide).abs() <= wide.abs() * 2**-4 + smallest).all()
    assert rounded["embed"].dtype == rounded["layers.0.input_norm"].dtype == torch.bfloat16


def test_a_channel_checkpoint_gives_what_quantising_at_load_gives(
    plain: Path, tmp_path: Path
) -> None:
    make_channel_checkpoint(plain, tmp_path / "model")
    assert ModelConfig.load(tmp_path / "model").checkpoint_format is WeightFormat.CHANNEL
    ready, made = load(tmp_path / "model", WeightFormat.CHANNEL), load(plain, WeightFormat.CHANNEL)
    assert ready.keys() == made.keys()
    for name, tensor in ready.items():
        assert torch.equal(tensor.view(torch.uint8), made[name].view(torch.uint8)), name


def test_block_scales_stay_with_their_part(plain: Path, tmp_path: Path) -> None:
    make_block_checkpoint(plain, tmp_path / "model")
    ready, exact = load(tmp_path / "model", WeightFormat.BLOCK), load(plain, WeightFormat.PLAIN)
    assert ready["layers.0.gate_up.scale"].shape == (4, 1)
    assert ready["layers.0.down.scale"].shape == (1, 2)
    for name in ("qkv", "o", "gate_up", "down"):
        wide, close = exact[f"layers.0.{name}"].float(), dequantised(ready, f"layers.0.{name}")
        assert (close - wide).norm() < 0.04 * wide.norm()


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose projections have whole blocks; its first layer is dense."""
    path = tmp_path_factory.mktemp("fp8-experts") / "plain"
    make_tiny_model("qwen3_moe", path, **{**SIZES, "moe_intermediate_size": 128})
    return path


def test_experts_keep_their_own_scales(sparse: Path, tmp_path: Path) -> None:
    make_channel_checkpoint(sparse, tmp_path / "channel")
    make_block_checkpoint(sparse, tmp_path / "block")
    exact, made = load(sparse, WeightFormat.PLAIN), load(sparse, WeightFormat.CHANNEL)
    ready = load(tmp_path / "channel", WeightFormat.CHANNEL)
    blocks = load(tmp_path / "block", WeightFormat.BLOCK)
    assert blocks["layers.1.experts_gate_up.scale"].shape == (8, 2, 1)
    assert ready["layers.1.experts_down.scale"].shape == (8, 128)
    for name, tensor in ready.items():
        assert torch.equal(tensor.view(torch.uint8), made[name].view(torch.uint8)), name
    for name in ("layers.1.experts_gate_up", "layers.2.experts_down"):
        for expert in range(8):
            wide = exact[name][expert].float()
            for parameters in (ready, blocks):
                one = {n: parameters[n][expert] for n in (name, f"{name}.scale")}
                assert (dequantised(one, name) - wide).norm() < 0.04 * wide.norm(), (name, expert)
    assert made["layers.1.router"].dtype == torch.bfloat16


def test_parts_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    make_tiny_model("qwen3", tmp_path, **{**SIZES, "num_key_value_heads": 1})
    set_config(tmp_path, quantization_config=BLOCK_CONFIG)
    with pytest.raises(ModelError, match=r"key heads \* head_dim is 64.*multiple of 128"):
        ModelConfig.load(tmp_path)


def changed(path: str, value: object) -> dict[str, Any]:
    """CHANNEL_CONFIG with one value, by its dotted path, replaced."""
    settings = copy.deepcopy(CHANNEL_CONFIG)
    *parents, last = path.split(".")
    place: Any = settings
    for name in parents:
        place = place[name]
    place[last] = value
    return settings


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"bits": 4}, "quant_method None"),
        (changed("config_groups", {}), "0 config_groups"),
        (changed(f"{GROUP}.weights.num_bits", 4), r"weights\.num_bits 4"),
        (changed(f"{GROUP}.weights.type", "int"), r"weights\.type 'int'"),
        (changed(f"{GROUP}.weights.strategy", "tensor"), r"weights\.strategy 'tensor'"),
        (changed(f"{GROUP}.input_activations.dynamic", False), r"input_activations\.dynamic False"),
        (changed(f"{GROUP}.input_activations", None), r"input_activations\.type None"),
        (changed(f"{GROUP}.output_activations", {"num_bits": 8}), "output_activations"),
        (changed("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
        (changed("format", "pack-quantized"), "format 'pack-quantized'"),
        (changed("ignore", []), "lm_head must be ignored"),
        (changed("ignore", ["lm_head", "model.layers.3.mlp.down_proj"]), "'model.layers.3.mlp"),
        (changed("ignore", ["lm_head", "re:.*mlp.*"]), r"'re:\.\*mlp"),
        (changed("ignore", ["lm_head", "re:.*experts.*w2$"]), r"'re:\.\*experts"),
        ({**BLOCK_CONFIG, "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({**BLOCK_CONFIG, "activation_scheme": "static"}, "activation_scheme 'static'"),
        ({**BLOCK_CONFIG, "modules_to_not_convert": ["mlp.down_proj"]}, "leaves projections"),
    ],
)
def test_other_formats_are_refused_by_name(
    plain: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    set_config(tmp_path, quantization_config=settings, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=message):
        ModelConfig.load(tmp_path)


def test_the_wrong_type_of_weight_is_named(plain: Path, tmp_path: Path) -> None:
    make_channel_checkpoint(plain, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**load_file(file), name: torch.zeros(256, 128)}, file)
    with pytest.raises(
        ModelError, match=r"up_proj\.weight is torch\.float32; expected float8_e4m3"
    ):
        load(tmp_path / "model", WeightFormat.CHANNEL)
