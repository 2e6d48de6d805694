"""The tuner's command: what it is asked for, and the words for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels.tile_format import Entry, Table, write_table
from kernels.tune import main, read_dims, wanted_keys

CONFIG = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model(folder: Path, **changes: object) -> str:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return str(folder)


def test_a_model_gives_the_keys_of_the_wanted_operations(tmp_path: Path) -> None:
    keys = wanted_keys(model(tmp_path, head_dim=32), [], ["rmsnorm", "paged_decode"])
    assert keys == ["rmsnorm/64", "paged_decode/4x2x32"]


def test_without_a_head_dim_heads_share_the_hidden_size(tmp_path: Path) -> None:
    assert read_dims(model(tmp_path)).head_dim == 16
    assert read_dims(model(tmp_path, head_dim=None)).head_dim == 16


def test_known_models_need_no_directory() -> None:
    assert read_dims("Qwen3-8B").hidden_size == 4096


def test_shapes_go_to_the_operations_they_fit() -> None:
    keys = wanted_keys(None, ["4096", "32x8x128"], ["rmsnorm", "paged_decode"])
    assert keys == ["rmsnorm/4096", "paged_decode/32x8x128"]


@pytest.mark.parametrize(
    ("shapes", "ops", "words"),
    [
        ([], ["rmsnorm"], "nothing to tune"),
        (["4096"], ["paged_decode"], "nothing to tune"),
        (["4096"], ["softmax"], "'softmax'"),
        (["40y"], ["rmsnorm"], "'40y'"),
        (["0x5"], ["rmsnorm"], "'0x5'"),
    ],
)
def test_what_cannot_be_tuned_is_named(shapes: list[str], ops: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wanted_keys(None, shapes, ops)


def test_a_model_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Qwen3-9000B"):
        read_dims("Qwen3-9000B")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="num_key_value_heads"):
        read_dims(str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a machine without a GPU")
def test_without_a_gpu_nothing_is_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--shapes", "64", "--ops", "rmsnorm", "--out", str(tmp_path / "t.json")])
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_gpus_table_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    entry = Entry(source="heuristic", order={}, rows=(), about={})
    write_table(path, Table(gpu="NVIDIA L4", triton="3.6", entries={"rmsnorm/64": entry}))
    monkeypatch.setattr("kernels.tune._gpu_name", lambda: "NVIDIA H100 PCIe")
    with pytest.raises(SystemExit):
        main(["--shapes", "64", "--ops", "rmsnorm", "--out", str(path)])
    assert "NVIDIA L4" in capsys.readouterr().err
