"""Loading safetensors: fused, tied, sharded; whatever does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.weights import Parameters, load_weights
from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model"
    make_tiny_model("qwen2", path)
    return path


@pytest.fixture
def copy(qwen2: Path, tmp_path: Path) -> Path:
    """A model directory that a test may damage."""
    return Path(shutil.copytree(qwen2, tmp_path / "model"))


def load(path: Path, lines: list[str] | None = None) -> Parameters:
    return load_weights(
        path,
        ModelConfig.load(path),
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=(lines if lines is not None else []).append,
    )


def rewrite(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Saves the single file again with tensors replaced, added or (None) left out."""
    tensors = {**load_file(path / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors")


def test_projections_are_fused_in_order(qwen2: Path) -> None:
    raw, lines = load_file(qwen2 / "model.safetensors"), list[str]()
    parameters = load(qwen2, lines)
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    for kind, name in (("weight", "layers.1.qkv"), ("bias", "layers.1.qkv.bias")):
        parts = [raw[f"{attention}{p}_proj.{kind}"] for p in "qkv"]
        assert torch.equal(parameters[name], torch.cat(parts))
    parts = [raw[f"{mlp}{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(parameters["layers.1.gate_up"], torch.cat(parts))
    assert "layers.1.o.bias" not in parameters
    assert lines[-1] == "loading weights: 100 % (model.safetensors)"


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("mixtral", ("block_sparse_moe", "w1", "w3", "w2")),
        ("qwen3_moe", ("mlp", "gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_are_stacked_in_order(
    tmp_path: Path, family: str, names: tuple[str, str, str, str]
) -> None:
    make_tiny_model(family, tmp_path)
    raw, parameters = load_file(tmp_path / "model.safetensors"), load(tmp_path)
    place = f"model.layers.1.{names[0]}."
    gate, up, down = (f"{place}experts.3.{part}.weight" for part in names[1:])
    gate_up = parameters["layers.1.experts_gate_up"][3]
    assert torch.equal(gate_up, torch.cat((raw[gate], raw[up])))
    assert torch.equal(parameters["layers.1.experts_down"][3], raw[down])
    assert torch.equal(parameters["layers.1.router"], raw[f"{place}gate.weight"])
    assert raw[f"{place}gate.weight"].std() > 0.1, "every token would go to the same experts"
    assert ("layers.0.router" in parameters) == (family == "mixtral")
    rewrite(tmp_path, {up: None})
    with pytest.raises(ModelError, match=rf"1 tensors .* missing, first {up}"):
        load(tmp_path)


def test_what_deepseek_has_besides_and_its_extra_layers(tmp_path: Path) -> None:
    make_tiny_model("deepseek_v3", tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    correction = load_file(tmp_path / "model.safetensors")[name]
    assert correction.any()
    # The layer of multi-token prediction, behind the three that there are, is not read.
    rewrite(tmp_path, {"model.layers.3.eh_proj.weight": torch.zeros(2)})
    parameters = load(tmp_path)
    assert torch.equal(parameters["layers.1.router_correction"], correction)
    assert parameters["layers.1.shared_down"].shape == (64, 2 * 48)
    rewrite(tmp_path, {"model.layers.4.eh_proj.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"model\.layers\.4\.eh_proj\.weight is unknown"):
        load(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_give_what_one_file_gives(tmp_path: Path, tied: bool) -> None:
    make_tiny_model("qwen3", tmp_path / "one", tie_word_embeddings=tied)
    make_tiny_model("qwen3", tmp_path / "many", tie_word_embeddings=tied, max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert (one["head"] is one["embed"]) == tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"model\.safetensors: .*missing, first model\.norm\.weight"),
        (
            {"model.extra.weight": torch.zeros(3)},
            r"model\.safetensors: tensor model\.extra\.weight",
        ),
        ({"model.norm.weight": torch.zeros(3)}, r"model\.norm\.weight has shape \[3\].*\[64\]"),
        ({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, r"model\.norm\.weight.*int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    copy: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    rewrite(copy, changes)
    with pytest.raises(ModelError, match=message):
        load(copy)


def test_tensors_without_meaning_are_skipped(copy: Path) -> None:
    rewrite(copy, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load(copy)


def test_pickles_are_not_weights(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="must be safetensors"):
        load(copy)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd"])
def test_an_index_cannot_leave_its_directory(copy: Path, name: str) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not the name of a file"):
        load(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00002-of-00002.safetensors does not exist"):
        load(copy)
