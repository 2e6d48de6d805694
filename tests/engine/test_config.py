"""What config.json may say: everything that would change the arithmetic is read or refused by
name.
"""

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
    ],
)
def test_what_changes_the_arithmetic_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=name):
        load(tmp_path, **changes)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match="num_attention_heads"):
        ModelConfig.load(tmp_path)
