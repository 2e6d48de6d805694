"""Other projects' Triton attention, for benchmarks/gpu/attention.py.

Owns the calls of kernels that lie in .peers/, which is not part of this project: without the files
there are no calls. .peers/lightllm_gqa/ holds LightLLM's gqa_flash_decoding_stage1.py and
gqa_flash_decoding_stage2.py (lightllm/models/llama/triton_kernel); .peers/vllm_unified_attention.py
is vLLM's triton_unified_attention.py as foundation-model-stack/vllm-triton-backend carries it,
without its autotuning decorators (its heuristics for H100 instead).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.peers import peer_module
from kernels.kv_pages import KvPages

Call = Callable[[int], object]


def decode_calls(
    query: torch.Tensor, dense: torch.Tensor, pages: KvPages, table: torch.Tensor, length: int
) -> dict[str, Call]:
    """query [num_seqs, num_heads, head_dim]; dense as in `Case`; by name."""
    calls = dict(_lightllm(query, dense, length)) | dict(_vllm(query, pages, table, length))
    return {f"{name} decode": call for name, call in calls.items()}


def prefill_calls(
    query: torch.Tensor, pages: KvPages, table: torch.Tensor, length: int
) -> dict[str, Call]:
    """query [num_rows, num_heads, head_dim] of one sequence."""
    return _vllm(query, pages, table, length)


def _lightllm(query: torch.Tensor, dense: torch.Tensor, length: int) -> dict[str, Call]:
    stage1 = peer_module("lightllm_gqa/gqa_flash_decoding_stage1.py")
    stage2 = peer_module("lightllm_gqa/gqa_flash_decoding_stage2.py")
    if stage1 is None or stage2 is None:
        return {}
    num_seqs, num_heads, head_dim = query.shape
    split = 128
    # Its pages are of one token: [set, 2, tokens, num_kv_heads, head_dim].
    caches = dense.transpose(3, 4).contiguous().flatten(2, 3)
    tokens = torch.arange(num_seqs * length, dtype=torch.int32, device="cuda").view(num_seqs, -1)
    rows = torch.arange(num_seqs, dtype=torch.int32, device="cuda")
    lengths = torch.full_like(rows, length)
    sums = torch.empty(num_seqs, num_heads, length // split + 1, device="cuda")
    parts = torch.empty(*sums.shape, head_dim, device="cuda")
    out = torch.empty_like(query)

    def call(i: int) -> torch.Tensor:
        key, value = caches[i]
        stage1.flash_decode_stage1(
            query, key, value, tokens, rows, lengths, length, parts, sums, split
        )
        stage2.flash_decode_stage2(parts, sums, lengths, out, split)
        return out

    return {"LightLLM": call}


def _vllm(query: torch.Tensor, pages: KvPages, table: torch.Tensor, length: int) -> dict[str, Call]:
    module = peer_module("vllm_unified_attention.py")
    if module is None:
        return {}
    num_seqs = table.shape[0]
    num_rows = query.shape[0] // num_seqs
    # Its pages: [num_blocks, block_tokens, num_kv_heads, head_dim], which our strides can say too.
    views = pages.values.permute(2, 3, 0, 4, 1, 5)
    first_rows = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda") * num_rows
    lengths = torch.full((num_seqs,), length, dtype=torch.int32, device="cuda")
    out = torch.empty_like(query)

    def call(i: int) -> torch.Tensor:
        key, value = views[i]
        module.unified_attention(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=first_rows,
            max_seqlen_q=num_rows,
            seqused_k=lengths,
            max_seqlen_k=length,
            avg_seqlen_q=num_rows,
            avg_seqlen_k=length,
            softmax_scale=query.shape[-1] ** -0.5,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        return out

    return {"vLLM unified": call}
