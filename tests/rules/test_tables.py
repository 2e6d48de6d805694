"""The shipped tile tables hold every key that the engine asks for and say where tiles come from."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.quantisation import WeightFormat
from engine.rope import RopeConfig
from engine.weights import allocate
from kernels.matmul_tiles import make_plan
from kernels.tile_format import TUNED, read_table
from kernels.tiles import FOLDER, Dims, TileTables, required_keys, table_name

MODELS = json.loads((FOLDER / "models.json").read_text())
TABLES = {path.stem: read_table(path) for path in FOLDER.glob("*.json") if path.stem != "models"}


@pytest.mark.parametrize("table", sorted(TABLES))
@pytest.mark.parametrize("model", MODELS)
def test_every_key_of_a_supported_model_is_there(model: str, table: str) -> None:
    tables = TileTables.load(TABLES[table].gpu, TABLES[table].triton)
    missing = [key for key in required_keys(Dims(**MODELS[model])) if key not in tables.entries]
    assert not missing


class Asked(dict[str, Any]):
    """Entries that note which keys were looked up."""

    def get(self, key: str, default: Any = None) -> Any:
        self[key] = None
        return default


@pytest.mark.parametrize("weight_format", [WeightFormat.PLAIN, WeightFormat.CHANNEL])
@pytest.mark.parametrize("model", MODELS)
def test_the_engines_weights_ask_for_no_other_key(model: str, weight_format: WeightFormat) -> None:
    config = ModelConfig(
        **MODELS[model],
        architecture="Qwen3ForCausalLM",
        num_layers=1,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e4),
        context_len=4096,
        tie_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=True,
        eos_token_ids=frozenset(),
    )
    device = torch.device("meta")
    parameters, _ = allocate(config, weight_format, device=device, dtype=torch.bfloat16)
    asked = Asked()
    tables = TileTables(entries=asked)
    for name, weight in parameters.items():
        if weight.dim() == 2 and name != "embed" and not name.endswith(".scale"):
            num_cols, width = weight.shape
            make_plan(num_cols, width, weight.dtype, block_scaled=False, tables=tables)
    assert asked
    assert set(asked) <= set(required_keys(config))


def test_both_hopper_gpus_have_a_table_of_their_own_name() -> None:
    assert set(TABLES) == {"h100", "h200"}
    assert all(table_name(table.gpu) == name for name, table in TABLES.items())


@pytest.mark.parametrize("table", sorted(TABLES))
def test_no_key_is_left_over(table: str) -> None:
    """A key that no supported model needs is a misspelt one."""
    needed = {key for dims in MODELS.values() for key in required_keys(Dims(**dims))}
    assert not set(TABLES[table].entries) - needed


def test_the_order_of_summation_is_the_same_on_every_gpu() -> None:
    """A request that moves to a rank on another GPU goes on with the same bits."""
    orders: dict[str, set[str]] = {}
    for table in TABLES.values():
        for key, entry in table.entries.items():
            orders.setdefault(key, set()).add(json.dumps(dict(entry.order), sort_keys=True))
    assert not {key: found for key, found in orders.items() if len(found) > 1}


@pytest.mark.parametrize("table", sorted(TABLES))
def test_products_take_their_tiles(table: str) -> None:
    tables = TileTables.load(TABLES[table].gpu, TABLES[table].triton)
    for name in tables.entries:
        op, _, key = name.partition("/")
        if op in ("gemm", "fp8_gemm"):
            dtype = torch.bfloat16 if op == "gemm" else torch.float8_e4m3fn
            num_cols, width = map(int, key.split("x"))
            plan = make_plan(num_cols, width, dtype, block_scaled=False, tables=tables)
            assert plan.at(1).num_splits == plan.at(8192).num_splits


@pytest.mark.parametrize("table", sorted(TABLES))
def test_a_tuned_entry_says_on_what_when_and_how_fast(table: str) -> None:
    for key, entry in TABLES[table].entries.items():
        if entry.source == TUNED:
            assert {"gpu", "date", "us"} <= set(entry.about), key
            assert entry.rows, key
