"""Tile tables: the right one for the GPU, the user's own first, and errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import tile_format
from kernels.tile_format import Entry, Table, read_table, write_table
from kernels.tiles import FOLDER, Dims, TileTables, required_keys, shipped_names, table_name

H100 = "NVIDIA H100 80GB HBM3"
TRITON = read_table(FOLDER / "h100.json").triton


def tuned(order: dict[str, int], **rows: dict[str, int]) -> Entry:
    places = tuple((int(name[1:]), values) for name, values in rows.items())
    return Entry(source=tile_format.TUNED, order=order, rows=places, about={})


def write(folder: Path, name: str, **fields: Any) -> Path:
    value = {"version": 1, "gpu": "Some GPU", "triton": TRITON, "entries": {}, **fields}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("gpu", "capability", "names"),
    [
        (H100, (9, 0), ("h100",)),
        ("NVIDIA H100 PCIe", None, ("h100",)),
        ("NVIDIA H200", (9, 0), ("h200", "h100")),
        ("NVIDIA H200 NVL", (9, 0), ("h200", "h100")),
        ("NVIDIA GH200 480GB", (9, 0), ("h100",)),
        ("NVIDIA A100-SXM4-80GB", (8, 0), ()),
        ("NVIDIA B200", (10, 0), ()),
    ],
)
def test_a_gpu_falls_back_to_its_family(
    gpu: str, capability: tuple[int, int] | None, names: tuple[str, ...]
) -> None:
    assert shipped_names(gpu, capability) == names
    assert all((FOLDER / f"{name}.json").is_file() for name in names)


def test_a_shipped_gpu_has_nothing_to_report() -> None:
    assert TileTables.load(H100, TRITON).notes == ()
    assert TileTables.load("NVIDIA H200", TRITON).notes == ()


def test_a_gpu_on_anothers_table_is_told_so() -> None:
    tables = TileTables.load("NVIDIA GH200 480GB", TRITON, capability=(9, 0))
    assert tables.entries == TileTables.load(H100, TRITON).entries
    assert "NVIDIA GH200 480GB" in tables.notes[0]
    assert "h100" in tables.notes[0]


def test_an_unknown_gpu_gets_no_entries_and_is_told_so() -> None:
    tables = TileTables.load("NVIDIA L4", TRITON, capability=(8, 9))
    assert not tables.entries
    assert "NVIDIA L4" in tables.notes[0]
    assert tables.at("gemm", "64x64", 1) is None


def test_another_triton_keeps_the_entries_and_says_so() -> None:
    tables = TileTables.load(H100, "99.1.0")
    assert tables.entries == TileTables.load(H100, TRITON).entries
    assert "99.1.0" in tables.notes[0]


def test_the_users_table_overrides_entry_by_entry(tmp_path: Path) -> None:
    rows = {"16": {"block_m": 32}}
    mine = {"source": "tuned", "order": {"num_splits": 3}, "rows": rows}
    write(tmp_path, "h100", entries={"gemm/24576x4096": mine, "gemm/1x2": mine})
    tables = TileTables.load(H100, TRITON, tmp_path)
    assert tables.at("gemm", "24576x4096", 4) == {"num_splits": 3, "block_m": 32}
    assert tables.at("gemm", "1x2", 99) == {"num_splits": 3, "block_m": 32}
    assert set(TileTables.load(H100, TRITON).entries) < set(tables.entries)


def test_any_gpu_can_have_a_table_of_its_own(tmp_path: Path) -> None:
    entry = {"source": "tuned", "rows": {"1": {"num_warps": 4}}}
    write(tmp_path, "nvidia-l4", entries={"rmsnorm/64": entry})
    tables = TileTables.load("NVIDIA L4", TRITON, tmp_path, capability=(8, 9))
    assert tables.at("rmsnorm", "64", 1) == {"num_warps": 4}


def test_the_smallest_row_count_that_holds_the_rows_decides() -> None:
    entry = tuned({"num_splits": 2}, m16={"block_m": 16}, m64={"block_m": 64})
    assert [entry.at(rows) for rows in (1, 16, 17, 64, 65)] == [
        {"num_splits": 2, "block_m": block} for block in (16, 16, 64, 64, 64)
    ]


def test_a_heuristic_entry_leaves_the_choice_to_the_operation() -> None:
    entry = Entry(source=tile_format.HEURISTIC, order={}, rows=(), about={})
    tables = TileTables(entries={"gemm/1x1": entry})
    assert tables.find("gemm", "1x1") is entry
    assert tables.at("gemm", "1x1", 5) is None


def test_a_users_setting_holds_for_every_shape_of_the_operation_alone() -> None:
    norm, gemm = tuned({}, m1={"num_warps": 1, "x": 2}), tuned({}, m1={"num_warps": 8})
    tables = TileTables(entries={"rmsnorm/64": norm, "gemm/64x64": gemm})
    changed = tables.with_setting("rmsnorm", num_warps=2)
    assert changed.at("rmsnorm", "64", 1) == {"num_warps": 2, "x": 2}
    assert changed.at("rmsnorm", "no entry", 1) == {"num_warps": 2}
    assert changed.at("gemm", "64x64", 1) == {"num_warps": 8}
    assert tables.at("rmsnorm", "64", 1) == {"num_warps": 1, "x": 2}


def test_a_bad_setting_is_refused_with_its_value() -> None:
    with pytest.raises(ValueError, match=r"rmsnorm\['num_warps'\] is 3"):
        TileTables.empty().with_setting("rmsnorm", num_warps=3)


def test_a_table_reads_as_it_was_written(tmp_path: Path) -> None:
    entries = {
        "gemm/128x64": tuned(
            {"block_k": 128, "num_splits": 4}, m1={"num_warps": 4}, m16={"num_warps": 8}
        ),
        "gemm/64x64": Entry(source=tile_format.HEURISTIC, order={}, rows=(), about={}),
    }
    table = Table(gpu=H100, triton="3.6", entries=entries)
    write_table(tmp_path / "deep" / "x.json", table)
    assert read_table(tmp_path / "deep" / "x.json") == table


def entry(**fields: Any) -> dict[str, Any]:
    return {"entries": {"gemm/1x1": {"source": "tuned", "rows": {"1": {"num_warps": 4}}, **fields}}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": 2}, ["version is 2", "version 1"]),
        ({"gpu": 3}, ["gpu is 3"]),
        ({"entries": []}, ["entries is []"]),
        ({"entries": {"gemm/1x1": 5}}, ["entries['gemm/1x1'] is 5"]),
        (entry(source="guess"), ["entries['gemm/1x1']", "source is 'guess'"]),
        (entry(tiles={}), ["entries['gemm/1x1']", "['tiles']"]),
        (entry(source="heuristic"), ["entries['gemm/1x1']", "heuristic"]),
        (entry(rows={"many": {}}), ["entries['gemm/1x1'].rows", "many"]),
        (entry(rows={"1": {"num_warps": 6}}), ["rows['1']['num_warps'] is 6", "power of two"]),
        (entry(rows={"1": {"num_warps": 64}}), ["rows['1']['num_warps'] is 64", "1 to 32"]),
        (entry(rows={"1": {"block_m": 48}}), ["rows['1']['block_m'] is 48"]),
        (entry(rows={"1": {"num_stages": 0}}), ["rows['1']['num_stages'] is 0"]),
        (entry(order={"num_splits": "2"}), [".order['num_splits'] is '2'"]),
        (entry(order={"num_splits": True}), [".order['num_splits'] is True"]),
        (entry(order={"num_splits": -1}), [".order['num_splits'] is -1"]),
    ],
)
def test_a_bad_table_is_refused_with_file_key_and_value(
    tmp_path: Path, fields: dict[str, Any], words: list[str]
) -> None:
    path = write(tmp_path, "h100", **fields)
    with pytest.raises(ValueError, match="h100") as caught:
        TileTables.load(H100, TRITON, tmp_path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_table_that_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "h100.json").write_text("{")
    with pytest.raises(ValueError, match=r"h100\.json is not JSON"):
        TileTables.load(H100, TRITON, tmp_path)


def test_a_cpu_has_no_tiles() -> None:
    tables = TileTables.of_device(torch.device("cpu"))
    assert not tables.entries
    assert not tables.notes


def test_a_table_name_is_a_file_name() -> None:
    assert table_name(H100) == "h100"
    assert table_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


def test_the_keys_of_a_model_are_those_of_its_products_norms_and_attention() -> None:
    dims = Dims(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
    )
    keys = required_keys(dims)
    layer = ["256x64", "64x128", "192x64", "64x96"]
    assert {f"{op}/{shape}" for op in ("gemm", "fp8_gemm") for shape in layer} < set(keys)
    assert {"gemm/100x64", "rmsnorm/64", "paged_decode/4x2x32"} < set(keys)
