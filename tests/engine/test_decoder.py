"""The decoder's logits against transformers', for every option config.json may set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import ModelConfig
from engine.plan import Chunk
from engine.rope import RopeConfig, inverse_frequencies
from engine.runner import ModelRunner
from tests.support.tiny_models import make_tiny_model

YARN_FREE = {"rope_type": "default", "rope_theta": 500_000.0}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": YARN_FREE, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("mistral", {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 32}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 3}),
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 7, "num_experts_per_tok": 1}),
    ("deepseek_v2", {}),
    ("deepseek_v2", {"q_lora_rank": 40, "rope_parameters": YARN_FREE}),
    (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "v_head_dim": 8},
    ),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False, "attention_bias": True}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_experts_per_tok": 8}),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=str)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    make_tiny_model(family, tmp_path, seed=3, **overrides)
    runner = ModelRunner.load(tmp_path, device="cpu", dtype="fp32", num_blocks=20, block_tokens=16)
    token_ids = torch.randint(0, 256, (300,)).tolist()
    hidden = runner.hidden_states([Chunk(token_ids=token_ids, start=0, blocks=list(range(20)))])
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    expected = reference(input_ids=torch.tensor([token_ids])).logits[0]
    logits = runner._decoder.logits(hidden[0])
    # fp32 sums in another order over a few layers; logits are of the order of 10.
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-3)


def test_llama3_frequencies_bend_only_long_waves() -> None:
    plain = inverse_frequencies(RopeConfig(theta=1e4), 64)
    scaled = inverse_frequencies(
        RopeConfig(theta=1e4, factor=8.0, low_freq_factor=1.0, original_context_len=256), 64
    )
    assert torch.equal(scaled[:8], plain[:8])
    assert torch.equal(scaled[-8:], plain[-8:] / 8)


def test_biases_follow_the_architecture(tmp_path: Path) -> None:
    make_tiny_model("qwen2", tmp_path)
    config = ModelConfig.load(tmp_path)
    assert config.qkv_bias and not config.output_bias and not config.qk_norm
