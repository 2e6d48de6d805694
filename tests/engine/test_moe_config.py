"""What config.json may say of experts: read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.moe_config import MoeConfig
from engine.rope import inverse_frequencies

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "moe_intermediate_size": 48,
    },
}


def load(path: Path, family: str, **changes: Any) -> ModelConfig:
    """Writes a config.json with changes, None leaving a key out, and loads it."""
    raw = {**BASE, **FAMILIES[family], **changes}
    raw = {name: value for name, value in raw.items() if value is not None}
    (path / "config.json").write_text(json.dumps(raw))
    return ModelConfig.load(path)


def experts(path: Path, family: str, **changes: Any) -> MoeConfig:
    moe = load(path, family, **changes).moe
    assert moe is not None
    return moe


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"decoder_sparse_step": 2}, {1, 3, 5}),
        ({"mlp_only_layers": [0, 3, 9]}, {1, 2, 4, 5}),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, {5}),
    ],
)
def test_qwen3_says_which_layers_have_experts(
    tmp_path: Path, changes: dict[str, Any], layers: set[int]
) -> None:
    config = load(tmp_path, "qwen3_moe", **changes)
    assert {layer for layer in range(6) if config.is_sparse(layer)} == layers


def test_sizes_and_weights_follow_the_family(tmp_path: Path) -> None:
    mixtral, qwen3 = experts(tmp_path, "mixtral"), experts(tmp_path, "qwen3_moe")
    assert (mixtral.intermediate_size, qwen3.intermediate_size) == (128, 48)
    assert mixtral.sparse_layers == frozenset(range(6))
    assert mixtral.routing.renormalise and not qwen3.routing.renormalise
    assert experts(tmp_path, "qwen3_moe", norm_topk_prob=True).routing.renormalise
    assert load(tmp_path, "qwen3_moe").qk_norm and not load(tmp_path, "mixtral").qk_norm


def test_both_names_of_the_number_of_experts(tmp_path: Path) -> None:
    for family in FAMILIES:
        for names in ({"num_experts": 5}, {"num_local_experts": 5}):
            both = {"num_experts": None, "num_local_experts": None}
            assert experts(tmp_path, family, **{**both, **names}).num_experts == 5


def test_mixtral_has_another_rope_theta_where_none_is_given(tmp_path: Path) -> None:
    rope = load(tmp_path, "mixtral").rope
    raw = json.loads((tmp_path / "config.json").read_text())
    expected = MixtralRotaryEmbedding(MixtralConfig.from_dict(raw)).inv_freq
    assert inverse_frequencies(rope, 16).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
        ("mixtral", {"num_experts": 4}, "num_experts and num_local_experts differ"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0; it must be an integer"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; num_local_experts is 8"),
        ("mixtral", {"num_experts_per_tok": True}, "num_experts_per_tok is True; it must be"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob False changes"),
        ("mixtral", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] changes"),
        ("mixtral", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 changes"),
        ("mixtral", {"attention_bias": True}, "attention_bias is not part"),
        ("mixtral", {"sliding_window": 128}, "sliding_window 128 is not supported"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ("qwen3_moe", {"moe_intermediate_size": -1}, "moe_intermediate_size is -1; it must be"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3; it must be a list"),
        ("qwen3_moe", {"mlp_only_layers": [-1]}, r"mlp_only_layers is \[-1\]; it must be"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, r"mlp_only_layers is \[True\]; it must be"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts 1 changes"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' changes"),
        ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor 2.5 changes"),
        ("qwen3_moe", {"n_group": 4, "topk_group": 2}, "n_group 4 changes"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64"),
        ("qwen3_moe", {"mlp_bias": True}, "mlp_bias is not part"),
    ],
)
def test_what_is_wrong_or_changes_the_arithmetic_is_named(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        load(tmp_path, family, **changes)


def test_an_expert_that_is_not_whole_blocks_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "num_key_value_heads": 2}
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ModelError, match=r"an expert's intermediate size is 48.*multiple of 128"):
        load(tmp_path, "qwen3_moe", **sizes, quantization_config=blocks)
