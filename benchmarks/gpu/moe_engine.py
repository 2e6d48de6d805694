"""Decode steps and prefill of the whole engine on random weights of Qwen3-30B-A3B's shape.

As benchmarks/gpu/engine.py, on a mixture of experts. The floor of a decode step counts the experts
that its tokens choose, were they to choose at random: random weights route nearly so.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.gpu.engine import PROMPT_LEN, Target, check, means, prefill_row
from benchmarks.gpu.engine_case import QWEN3_8B, load_dummy, prompts_of, run_engine
from benchmarks.gpu.timing import Result, print_table
from engine.cuda_runner import CudaRunner

# As Qwen/Qwen3-30B-A3B's config.json.
QWEN3_30B_A3B: dict[str, Any] = {
    **QWEN3_8B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# dtype -> sequences -> target. vLLM: 0.25.1 on the same kind of GPU, random weights.
DECODE: dict[str, dict[int, Target]] = {
    "fp8": {1: Target(must=2.6, aim=1.9), 64: Target(must=13, aim=10.5)},
    "bf16": {
        1: Target(must=3.9, aim=3.0, peer=4.7),
        16: Target(must=13.5, aim=11, peer=16.3),
        64: Target(must=21, aim=18.5, peer=24.2),
        128: Target(must=23, aim=20.5, peer=26.0),
    },
}
# Tokens of a prompt -> target, bf16.
PREFILL = {2048: Target(must=80, aim=65, peer=87), 8192: Target(must=150, aim=120, peer=161)}


def run(bandwidth: float) -> Result:
    """Every case; ValueError when tokens depend on the batch."""
    rows: list[dict[str, object]] = []
    for dtype, cases in DECODE.items():
        runner = load_dummy(QWEN3_30B_A3B, dtype=dtype, max_batch=128, chunk_tokens=8192)
        check(runner)
        for num_sequences, target in cases.items():
            rows.append(decode_row(runner, num_sequences, target, dtype, bandwidth))
            print_table("", rows[-1:])
        if dtype == "bf16":
            rows += [
                prefill_row(runner, tokens, target, dtype) for tokens, target in PREFILL.items()
            ]
        del runner
        gc.collect()
        torch.cuda.empty_cache()
    return Result(
        name="moe_engine",
        what="engine, random weights of Qwen3-30B-A3B's shape, 128 tokens in",
        rows=rows,
        copy_bytes_per_s=bandwidth,
        notes=[
            "ratio: must / ms: 1 and more is reached",
            "vllm: 0.25.1 on the same kind of GPU, random weights; not run beside ours",
        ],
    )


def decode_row(
    runner: CudaRunner, num_sequences: int, target: Target, dtype: str, bandwidth: float
) -> dict[str, object]:
    """Mean step time over outputs 64 to 256."""
    first, last = 64, 256
    prompts = prompts_of(num_sequences, PROMPT_LEN, QWEN3_30B_A3B["vocab_size"])
    made = run_engine(runner, prompts, last)
    step_ms = made.step_s(first, last) * 1e3
    context = PROMPT_LEN + (first + last) // 2
    floor_ms = floor_num_bytes(runner, num_sequences, context, dtype) / bandwidth * 1e3
    return {
        "case": f"decode {dtype}",
        "sequences": num_sequences,
        "ms": step_ms,
        "floor_ms": floor_ms,
        "must": target.must,
        "aim": target.aim,
        "vllm": target.peer or "",
        "ratio": target.must / step_ms,
        **means(made, first, last),
    }


def floor_num_bytes(runner: CudaRunner, num_sequences: int, context: int, dtype: str) -> float:
    """Bytes that a decode step must read: dense weights, chosen experts, KV."""
    made, layout = QWEN3_30B_A3B, runner.layout
    num_experts, top_k = made["num_experts"], made["num_experts_per_tok"]
    width = 1 if dtype == "fp8" else 2
    experts = made["num_hidden_layers"] * num_experts * width
    experts *= 3 * made["hidden_size"] * made["moe_intermediate_size"]
    share = 1 - (1 - top_k / num_experts) ** num_sequences
    kv = num_sequences * context * layout.num_bytes / layout.block_tokens
    return runner.decoder.step_num_bytes + experts * share + kv  # the first without experts
