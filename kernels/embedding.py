"""The first kernel of a step: token embeddings, of tokens that only the device may know yet.

Owns the choice between a token from the host and one that the step before sampled, so that a step
can be launched before the last one's tokens reached the host. Never changes a token.
"""

# Triton's jit is beyond the type checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl


def embed(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    sources: torch.Tensor | None = None,
    sampled: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """[num_rows, hidden_size] of weight [vocab_size, hidden_size], in its dtype.

    token_ids [num_rows] int; with sources [num_rows] int32, a row whose source is not negative
    takes the token sampled[source] instead.
    """
    if weight.is_cuda:
        return _launch_triton(token_ids, weight, sources, sampled, pdl=pdl)
    if sources is not None and sampled is not None:
        chosen = sampled[sources.clamp_min(0).long()].to(token_ids.dtype)
        token_ids = torch.where(sources >= 0, chosen, token_ids)
    return weight[token_ids]


def _launch_triton(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    sources: torch.Tensor | None,
    sampled: torch.Tensor | None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    num_rows, width = token_ids.shape[0], weight.shape[1]
    out = torch.empty(num_rows, width, dtype=weight.dtype, device=weight.device)
    _embed_kernel[(num_rows,)](
        token_ids,
        weight,
        token_ids if sources is None else sources,
        token_ids if sampled is None else sampled,
        out,
        width,
        weight.shape[0],
        HAS_SOURCES=sources is not None and sampled is not None,
        BLOCK=min(8192, triton.next_power_of_2(width)),
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
    return out


@triton.jit
def _embed_kernel(
    token_ids_ptr,
    weight_ptr,
    sources_ptr,
    sampled_ptr,
    out_ptr,
    width,
    vocab_size,
    HAS_SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids_ptr + row).to(tl.int64)
    if HAS_SOURCES:
        source = tl.load(sources_ptr + row)
        if source >= 0:
            token = tl.load(sampled_ptr + source).to(tl.int64)
    # A token that a failed step left behind must not read outside the weight.
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        kept = columns < width
        values = tl.load(weight_ptr + token * width + columns, mask=kept)
        tl.store(out_ptr + row * width + columns, values, mask=kept)
