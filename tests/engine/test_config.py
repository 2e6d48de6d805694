"""What config.json may say: whatever would change the arithmetic is read or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.errors import ModelError

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "eos_token_id": [1, 2],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def load(path: Path, **changes: Any) -> ModelConfig:
    """Writes a config.json with changes and loads it."""
    (path / "config.json").write_text(json.dumps({**BASE, **changes}))
    return ModelConfig.load(path)


def test_defaults_and_eos(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    config = load(tmp_path)
    assert config.head_dim == 16 and config.rope.theta == 10_000.0
    assert config.eos_token_ids == {1, 2, 7}


def test_both_spellings_of_rope(tmp_path: Path) -> None:
    old = load(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3)
    new = load(tmp_path, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old.rope == new.rope and old.rope.factor == 8.0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GPT2LMHeadModel", {"architectures": ["GPT2LMHeadModel"]}),
        ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("linear", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("dynamic", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}),
        ("sliding_window", {"architectures": ["MistralForCausalLM"], "sliding_window": 128}),
        (
            "sliding_window",
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 128,
                "use_sliding_window": True,
            },
        ),
        ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("quantization_config", {"quantization_config": {"quant_method": "fp8"}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        (
            "partial_rotary_factor",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ),
        ("per layer type", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ("architectures", {"architectures": None}),
        ("architectures", {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}),
        ("model_type", {"model_type": "qwen2"}),
        ("auto_map", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
        ("num_experts", {"num_experts": 8}),
        ("attention_bias", {"architectures": ["MistralForCausalLM"], "attention_bias": True}),
        ("mlp_bias", {"architectures": ["MistralForCausalLM"], "mlp_bias": True}),
        ("not a multiple", {"num_key_value_heads": 3}),
        ("head_dim 15 is odd", {"head_dim": 15}),
        ("eos_token_id 100", {"eos_token_id": 100}),
        ("num_layers is 0", {"num_hidden_layers": 0}),
        ("wrong type", {"num_attention_heads": "4"}),
        ("wrong type", {"rope_scaling": "linear"}),
        ("factor", {"rope_scaling": {**LLAMA3, "factor": 0.5}}),
        ("low_freq_factor is missing", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("head_dim is missing", {"architectures": ["Qwen3ForCausalLM"]}),
    ],
)
def test_what_changes_the_arithmetic_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=name):
        load(tmp_path, **changes)


def test_options_at_their_neutral_value_are_accepted(tmp_path: Path) -> None:
    neutral = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 512,
        "attention_bias": False,
        "layer_types": ["full_attention", "full_attention"],
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    assert load(tmp_path, **neutral).rope.factor == 1.0


def test_qwen2_ignores_a_window_it_does_not_use(tmp_path: Path) -> None:
    window = {"sliding_window": 128, "use_sliding_window": False}
    load(tmp_path, architectures=["Qwen2ForCausalLM"], **window)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_what_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is not"):
        ModelConfig.load(tmp_path)


def test_no_model_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        ModelConfig.load(tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match="num_attention_heads"):
        ModelConfig.load(tmp_path)
