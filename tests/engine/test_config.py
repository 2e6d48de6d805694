"""What config.json may say: whatever would change the arithmetic is read or refused by name."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.rope import inverse_frequencies

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
        ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("quantization_config", {"quantization_config": {"quant_method": "fp8"}}),
        (
            "partial_rotary_factor",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ),
        ("per layer type", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ("architectures", {"architectures": None}),
        ("architectures", {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}),
        ("model_type", {"model_type": "qwen2"}),
        ("attention_bias", {"architectures": ["MistralForCausalLM"], "attention_bias": True}),
        ("mlp_bias", {"architectures": ["MistralForCausalLM"], "mlp_bias": True}),
        ("not a multiple", {"num_key_value_heads": 3}),
        ("head_dim 15 is odd", {"head_dim": 15}),
        ("eos_token_id 100", {"eos_token_id": 100}),
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
        "logit_scale": 1,
        "use_qk_norm": False,
        "rope_interleaved": False,
        "clip_qkv": None,
        "num_experts": 0,
        "is_causal": True,
        "hidden_activation": "silu",
        "use_sliding_window": False,
        "quantization_config": None,
    }
    assert load(tmp_path, **neutral).rope.factor == 1.0


def test_qwen2_ignores_a_window_it_does_not_use(tmp_path: Path) -> None:
    window = {"sliding_window": 128, "use_sliding_window": False}
    load(tmp_path, architectures=["Qwen2ForCausalLM"], **window)


# Values that equal a neutral one in Python (True == 1, False == 0) or are neutral elsewhere.
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("use_qk_norm", (True, 1, 0, "no")),
        ("alibi", (True, 1)),
        ("rope_interleaved", (True, 1)),
        ("attention_sinks", (True, 1)),
        ("auto_map", (True, 1, {"AutoModel": "modeling.Model"})),
        ("quantization_config", (True, 1, 0, False, "", [])),
        ("compression_config", (True, False, [])),
        ("clip_qkv", (1.0, 0, True)),
        ("attn_logit_softcapping", (1.0, 0, 50)),
        ("final_logit_softcapping", (1.0, 30.0)),
        ("partial_rotary_factor", (0, False, True, 0.5)),
        ("logit_scale", (0, True, 0.0625)),
        ("residual_multiplier", (0, True)),
        ("attention_multiplier", (1, 0.5)),
        ("scale_depth", (1, 1.4)),
        ("kv_lora_rank", (1, 0, 512)),
        ("q_lora_rank", (1, 1536)),
        ("num_experts", (1, 8, True, False)),
        ("attention_chunk_size", (0, 1, 8192)),
        ("no_rope_layers", ([], [1, 0])),
        ("is_causal", (False, None, 1)),
        ("norm_type", ("layernorm", "np_layernorm", True)),
        ("hidden_act", (None, "gelu", True)),
        ("hidden_activation", ("gelu_pytorch_tanh",)),
        ("parallel_attn", (True,)),
        ("use_parallel_residual", (True,)),
        ("mup_enabled", (True,)),
        ("no_bias", (False, 1)),
        ("use_bias", (True,)),
        ("is_encoder_decoder", (True,)),
        ("position_embedding_type", ("alibi", "nope")),
        ("per_layer_config", ({"0": {"head_dim": 8}}, True)),
        ("layer_types", ("full_attention", [["full_attention"]], [None], True)),
    ],
)
def test_an_option_that_is_not_neutral_is_refused_by_name(
    tmp_path: Path, name: str, values: tuple[Any, ...]
) -> None:
    for value in values:
        with pytest.raises(ModelError, match=rf"config\.json: {name} .*(supported|must be)"):
            load(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, 3e4),
        ({"rope_theta": 2e4, "rope_parameters": {"rope_type": "default"}}, 2e4),
        ({"rope_theta": 2e4, "rope_parameters": {"rope_theta": 3e4}}, 3e4),
        # rope_scaling replaces rope_parameters with all it has; an empty one does not.
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, 1e4),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 3e4}}, 1e4),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {**LLAMA3}}, 1e4),
        ({"rope_scaling": {}, "rope_parameters": {**LLAMA3, "rope_theta": 3e4}}, 3e4),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 128}, 1e4),
        ({"rope_scaling": {**LLAMA3, "type": "yarn"}}, 1e4),
    ],
)
def test_rope_is_what_transformers_computes(
    tmp_path: Path, changes: dict[str, Any], theta: float
) -> None:
    rope = load(tmp_path, **changes).rope
    raw = json.loads((tmp_path / "config.json").read_text())
    expected = LlamaRotaryEmbedding(LlamaConfig.from_dict(raw)).inv_freq
    assert rope.theta == theta
    torch.testing.assert_close(inverse_frequencies(rope, 16), expected, rtol=1e-6, atol=0)


def test_llama3_without_an_original_length_takes_the_models_own(tmp_path: Path) -> None:
    scaling = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    assert load(tmp_path, rope_scaling=scaling).rope.original_context_len == 512


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "rope_scaling: rope_type 'yarn'"),
        ({"rope_type": "default", "partial_rotary_factor": 0}, "partial_rotary_factor 0"),
        ({"full_attention": {"rope_type": "default"}}, "rope_scaling per layer type"),
    ],
)
def test_rope_scaling_beside_neutral_rope_parameters_is_refused(
    tmp_path: Path, scaling: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(tmp_path, rope_scaling=scaling, rope_parameters={"rope_type": "default"})


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("MistralForCausalLM", {"sliding_window": 128, "use_sliding_window": False}),
        ("MistralForCausalLM", {"sliding_window": True}),
        ("MistralForCausalLM", {"max_position_embeddings": 4097}),  # transformers' default: 4096
        ("LlamaForCausalLM", {"sliding_window": 128}),
        ("MistralForCausalLM", {"sliding_window": 511}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 128}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_position_embeddings": 8192}),
        ("Qwen2ForCausalLM", {"use_sliding_window": "false"}),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 128}),
    ],
)
def test_a_window_that_would_be_used_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=r"sliding_window .*(only full attention|must be)"):
        load(tmp_path, architectures=[architecture], head_dim=16, **changes)


@pytest.mark.parametrize(
    ("name", "values", "limit"),
    [
        *(
            (name, (True, 0, -1, 2.0, "2", [2], {}, 2**31), "an integer from 1 to 2147483647")
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "original_max_position_embeddings",
            )
        ),
        *(
            (name, ("x", "1", 0, -1, True, None, [], nan, inf, 10**400), "a finite number above 0")
            for name in ("rms_norm_eps", "rope_theta")
        ),
        ("tie_word_embeddings", ("false", 0, 1, None), "true or false"),
        ("attention_bias", ("false", 0, 1, None), "true or false"),
        ("mlp_bias", ("false", 0, 1, None), "true or false"),
        ("eos_token_id", (True, [True], "2", 2.0, [[2]], {}), "an integer or a list"),
        ("rope_parameters", (True, 0, "", []), "an object or null"),
        ("rope_scaling", (True, 0, "", "linear", []), "an object or null"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_named_with_its_limit(
    tmp_path: Path, name: str, values: tuple[Any, ...], limit: str
) -> None:
    for value in values:
        changes = {"rope_scaling": LLAMA3, name: value}
        with pytest.raises(ModelError, match=rf"config\.json: {name} is .*must be {limit}"):
            load(tmp_path, **changes)


@pytest.mark.parametrize("name", list(LLAMA3)[1:])
def test_llama3_values_of_the_wrong_type_are_named(tmp_path: Path, name: str) -> None:
    for value in ("x", -1, 0, True, None, nan, inf, [8]):
        with pytest.raises(ModelError, match=rf"config\.json: .*{name} is .*must be"):
            load(tmp_path, rope_scaling={**LLAMA3, name: value})


def test_an_eos_id_of_generation_config_is_named_with_its_file(tmp_path: Path) -> None:
    for value, message in ((True, "must be an integer"), (100, "not in the vocabulary of 100")):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ModelError, match=rf"generation_config\.json: eos_token_id.*{message}"):
            load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 200_000, '{"a": ' + "1" * 5000 + "}"])
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
