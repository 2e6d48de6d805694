"""What config.json may say of DeepSeek-V2 and V3: MLA, yarn, routing; refused by name or read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.loading import block_layout
from engine.rope import inverse_frequencies
from engine.runners import RunnerOptions, load_cuda_runner

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.5,
}
V2: dict[str, Any] = {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "greedy"}
# As the published config.json has it.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
}
YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 512,
}
ABSENT = object()


def load(path: Path, family: dict[str, Any], **changes: Any) -> ModelConfig:
    """Writes a config.json with changes, ABSENT leaving a key out, and loads it."""
    raw = {**BASE, **family, **changes}
    raw = {name: value for name, value in raw.items() if value is not ABSENT}
    (path / "config.json").write_text(json.dumps(raw))
    return ModelConfig.load(path)


def test_the_cache_keeps_one_latent_for_all_heads(tmp_path: Path) -> None:
    layout = block_layout(load(tmp_path, V3), 16, torch.float32)
    assert layout.shape == (1, 5, 1, 16, 32 + 8)
    assert layout.num_bytes == 5 * 16 * 40 * 4


def test_routing_follows_the_version(tmp_path: Path) -> None:
    v2, v3 = load(tmp_path, V2).moe, load(tmp_path, V3).moe
    assert v2 is not None and v3 is not None
    assert (v2.routing.scoring, v3.routing.scoring) == ("softmax", "sigmoid")
    assert (v2.routing.num_groups, v3.routing.num_groups, v3.routing.top_groups) == (1, 4, 2)
    assert (v2.biased, v3.biased, v3.routing.group_score) == (False, True, "top2")
    assert (v2.routing.renormalise, v3.routing.renormalise) == (False, True)
    assert v3.routing.scale == 2.5 and v3.shared_size == 96
    assert v3.sparse_layers == {2, 3, 4}
    groups = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    grouped = load(tmp_path, V2, **groups).moe
    assert grouped is not None and grouped.routing.num_groups == 2
    assert grouped.routing.group_score == "max"


def test_the_query_may_have_no_compression(tmp_path: Path) -> None:
    config = load(tmp_path, V2, q_lora_rank=None)
    assert config.mla is not None and config.mla.q_rank is None and config.mla.interleaved


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mscale": 0.707, "mscale_all_dim": 0.5, "factor": 4.0},
        {"mscale": ABSENT, "mscale_all_dim": ABSENT},
        {"mscale_all_dim": 0},
        {"attention_factor": 1.3, "truncate": False},
        {"beta_fast": 16, "beta_slow": 4},
        {"beta_fast": ABSENT, "beta_slow": ABSENT},
    ],
    ids=str,
)
def test_yarn_is_what_transformers_computes(tmp_path: Path, changes: dict[str, Any]) -> None:
    scaling = {name: v for name, v in {**YARN, **changes}.items() if v is not ABSENT}
    config = load(tmp_path, V3, rope_scaling=scaling, rope_theta=20_000.0)
    raw = json.loads((tmp_path / "config.json").read_text())
    theirs = DeepseekV3Config.from_dict({**raw, "qk_rope_head_dim": 64})
    reference = DeepseekV3RotaryEmbedding(theirs)
    yarn, mla = config.rope.yarn, config.mla
    assert yarn is not None and mla is not None
    made = inverse_frequencies(config.rope, 64)
    torch.testing.assert_close(made, reference.inv_freq, rtol=1e-6, atol=0)
    assert yarn.table_scale == pytest.approx(reference.attention_scaling, rel=1e-12)
    attention = DeepseekV3Attention(DeepseekV3Config.from_dict(raw), 0)
    assert mla.softmax_scale == pytest.approx(attention.scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (V3, {"num_key_value_heads": 2}, "num_key_value_heads 2 is not supported with MLA"),
        (V3, {"kv_lora_rank": ABSENT}, "kv_lora_rank is missing"),
        (V3, {"kv_lora_rank": 0}, "kv_lora_rank is 0; it must be an integer from 1"),
        (V3, {"q_lora_rank": ABSENT}, "q_lora_rank is missing"),
        (V3, {"q_lora_rank": 0}, "q_lora_rank is 0; it must be"),
        (V3, {"v_head_dim": "12"}, "v_head_dim is '12'; it must be"),
        (V3, {"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd"),
        (V3, {"rope_interleave": 1}, "rope_interleave is 1; it must be true or false"),
        (V3, {"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        (V3, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        (V3, {"n_group": 3}, r"n_routed_experts 8, n_group 3.*a divisor of 8"),
        (V3, {"topk_group": 5}, r"topk_group 5.*1 to num_groups 4"),
        (V3, {"num_experts_per_tok": 5}, r"num_experts_per_tok 5: top_k: 5; 1 to 4 experts"),
        (V3, {"n_group": ABSENT}, "n_group is missing"),
        (V3, {"n_shared_experts": None}, "n_shared_experts is None; it must be"),
        (V3, {"first_k_dense_replace": -1}, "first_k_dense_replace is -1; it must be"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq 2 changes"),
        (V3, {"routed_scaling_factor": 0}, "routed_scaling_factor is 0; it must be"),
        (V3, {"num_nextn_predict_layers": True}, "num_nextn_predict_layers is True; it must be"),
        (V3, {"rope_scaling": {**YARN, "type": "llama3"}}, "rope_type 'llama3' is not supported"),
        (V3, {"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling: factor 0.5 must be"),
        (V3, {"rope_scaling": {**YARN, "mscale": -1}}, "rope_scaling.mscale is -1; it must be"),
        (V3, {"rope_scaling": {**YARN, "truncate": 1}}, "truncate is 1; it must be true or false"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob True is not supported"),
        (V2, {"norm_topk_prob": 0}, "norm_topk_prob 0 is not supported"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' changes"),
        (V2, {"topk_method": "group_limited_greedy"}, "n_group is missing"),
        (V2, {"mlp_bias": True}, "mlp_bias is not part"),
    ],
)
def test_what_is_wrong_or_changes_the_arithmetic_is_named(
    tmp_path: Path, family: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: .*{message}"):
        load(tmp_path, family, **changes)


def test_a_gpu_has_no_kernels_for_mla(tmp_path: Path) -> None:
    load(tmp_path, V3)
    with pytest.raises(ModelError, match="device: cuda; DeepseekV3ForCausalLM runs on a CPU only"):
        load_cuda_runner(tmp_path, device="cuda", options=RunnerOptions(num_blocks=1))
