"""FP8 weights and FP8 KV on a CPU: close to the exact model, the same bits in any company."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.loading import Precision
from engine.plan import Chunk
from engine.quantisation import FP8, WeightFormat
from engine.runner import ModelRunner
from tests.support.fp8_models import make_block_checkpoint, make_channel_checkpoint
from tests.support.tiny_models import make_tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "head_dim": 64,
}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights plain, FP8 per channel and FP8 in blocks."""
    folder = tmp_path_factory.mktemp("precision")
    make_tiny_model("qwen3", folder / "plain", **SIZES)
    make_channel_checkpoint(folder / "plain", folder / "channel")
    make_block_checkpoint(folder / "plain", folder / "block")
    return {name: folder / name for name in ("plain", "channel", "block")}


def load(path: Path, dtype: str = "auto", kv_dtype: str = "auto") -> ModelRunner:
    torch.set_num_threads(1)
    return ModelRunner.load(path, dtype=dtype, kv_dtype=kv_dtype, num_blocks=40, block_tokens=16)


def tokens_of(num_tokens: int) -> list[int]:
    rng = random.Random(num_tokens)
    return [rng.randrange(256) for _ in range(num_tokens)]


def hidden(runner: ModelRunner, tokens: list[int], cuts: tuple[int, ...] = ()) -> torch.Tensor:
    """[num_tokens, hidden_size] computed in chunks that end at cuts."""
    parts: list[torch.Tensor] = []
    for start, stop in zip((0, *cuts), (*cuts, len(tokens)), strict=True):
        chunk = Chunk(token_ids=tokens[start:stop], start=start, blocks=list(range(7)))
        parts += runner.hidden_states([chunk])
    return torch.cat(parts)


# Small weights: attention over latents of 128 values would be all peaks.
LATENT: dict[str, Any] = {
    "initializer_range": 0.05,
    "num_key_value_heads": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def experts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """As models, of mixtures of experts."""
    folder = tmp_path_factory.mktemp(f"precision-{request.param}")
    sizes = SIZES if request.param == "qwen3_moe" else {**SIZES, **LATENT}
    make_tiny_model(request.param, folder / "plain", moe_intermediate_size=128, **sizes)
    make_channel_checkpoint(folder / "plain", folder / "channel")
    make_block_checkpoint(folder / "plain", folder / "block")
    return {name: folder / name for name in ("plain", "channel", "block")}


@pytest.mark.parametrize("model", ["plain", "channel", "block"])
def test_fp8_experts_stay_near_the_exact_model_whatever_the_chunks(
    experts: dict[str, Path], model: str
) -> None:
    tokens = tokens_of(70)
    exact = hidden(load(experts["plain"], "fp32"), tokens)
    runner = load(experts[model], "fp8")
    whole = hidden(runner, tokens).clone()
    # As below, over three layers; a router near a tie may choose another expert.
    assert (whole.float() - exact).norm() < 0.25 * exact.norm()
    for cuts in ((1,), (16, 33), (64, 65, 69)):
        assert torch.equal(hidden(runner, tokens, cuts), whole), cuts


@pytest.mark.parametrize(
    ("model", "dtype", "kv_dtype", "limit"),
    [
        ("plain", "fp8", "auto", 0.2),
        ("plain", "bf16", "fp8", 0.1),
        ("plain", "fp32", "fp8", 0.1),
        ("channel", "auto", "auto", 0.2),
        ("block", "auto", "fp8", 0.2),
    ],
)
def test_fp8_stays_near_the_exact_model_whatever_the_chunks(
    models: dict[str, Path], model: str, dtype: str, kv_dtype: str, limit: float
) -> None:
    tokens = tokens_of(70)
    exact = hidden(load(models["plain"], "fp32"), tokens)
    runner = load(models[model], dtype, kv_dtype)
    whole = hidden(runner, tokens).clone()
    # Three bits of mantissa in every product, over two layers.
    assert (whole.float() - exact).norm() < limit * exact.norm()
    for cuts in ((1,), (16, 33), (64, 65, 69)):
        assert torch.equal(hidden(runner, tokens, cuts), whole), cuts


def test_auto_follows_checkpoint_and_device(models: dict[str, Path]) -> None:
    plain, block = ModelConfig.load(models["plain"]), ModelConfig.load(models["block"])
    auto = {"dtype": "auto", "kv_dtype": "auto"}
    assert Precision.resolve(plain, **auto, device=CPU).dtype == torch.float32
    assert Precision.resolve(plain, **auto, device=CUDA).dtype == torch.bfloat16
    made = Precision.resolve(block, **auto, device=CUDA)
    assert (made.weight_format, made.kv_dtype) == (WeightFormat.BLOCK, torch.bfloat16)
    made = Precision.resolve(plain, dtype="fp8", kv_dtype="fp8", device=CPU)
    assert (made.weight_format, made.kv_dtype) == (WeightFormat.CHANNEL, FP8)


def test_what_blocks_depend_on_has_different_names(models: dict[str, Path]) -> None:
    config = ModelConfig.load(models["plain"])
    names = {
        str(Precision.resolve(config, dtype=dtype, kv_dtype=kv_dtype, device=CUDA))
        for dtype in ("bf16", "fp8")
        for kv_dtype in ("auto", "fp8")
    }
    assert len(names) == 4 and "torch.bfloat16" in names


@pytest.mark.parametrize(
    ("model", "dtype", "kv_dtype", "message"),
    [
        ("block", "bf16", "auto", "dtype: bf16; the checkpoint's weights are FP8"),
        ("plain", "int4", "auto", "dtype: 'int4'"),
        ("plain", "auto", "int8", "kv_dtype: 'int8'"),
        ("plain", "fp32", "bf16", "kv_dtype: bf16; KV of an fp32 model"),
    ],
)
def test_impossible_precisions_are_refused(
    models: dict[str, Path], model: str, dtype: str, kv_dtype: str, message: str
) -> None:
    config = ModelConfig.load(models[model])
    with pytest.raises(ValueError, match=message) as caught:
        Precision.resolve(config, dtype=dtype, kv_dtype=kv_dtype, device=CPU)
    assert isinstance(caught.value, ModelError) == (model == "block")
