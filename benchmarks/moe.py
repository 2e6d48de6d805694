"""Times a layer of experts beside its floor and other projects' Triton kernels, on one GPU.

    python -m benchmarks.moe [--formats channel,block,plain] [--tokens 1,8,16,32,64,4096]
                             [--align kvmesh] [--check-only] [--write]

Qwen3-30B-A3B's layer (128 experts, 8 a token, H 2048, I 768), random weights, uniform routing and a
skewed one (an eighth of the experts gets most tokens). `us` is alignment, both products and the
weighted sum, with x quantised before (for FP8) and routed before; `route_us` and `quantise_us` are
those. The floor is the bytes of the experts that tokens chose over the bandwidth of a copy. vLLM's
and LightLLM's calls quantise x themselves. Every result is compared with the torch twin first.
L2-cold: weights rotate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.timing import (
    Result,
    copy_bandwidth,
    num_sets,
    print_table,
    require_close,
    time_graph,
)
from benchmarks.moe_peers import peer_call
from kernels.fp8_quant import FP8, GROUP, Fp8Rows, quantise
from kernels.moe_align import ALIGN_SOURCES, Align, alignment
from kernels.moe_gemm import _moe_torch, moe_mlp
from kernels.moe_routing import Routed, Routing, moe_route
from kernels.weight_stack import WeightStack, prepare_stack

NUM_EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
FORMATS = ("channel", "block", "plain")
TOKENS = (1, 8, 16, 32, 64, 4096)
PEERS = ("vllm", "lightllm")
ROUTING = Routing(top_k=TOP_K, renormalise=True)
# Relative to the twin: bf16 rounding; e4m3 rounding of rows that differ by a bf16 rounding.
LIMITS = {"plain": 5e-3, "channel": 2e-2, "block": 2e-2}
# The peers quantise behind SiLU per token, or another way.
_PEER_LIMIT = 8e-2
# Size of the copy that an H100 makes fastest.
_COPY_NUM_BYTES = 2**28
_SKEW = 3.0

Layer = tuple[WeightStack, WeightStack]


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--align", default="auto", choices=ALIGN_SOURCES)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    align = alignment(options.align)
    copy = 0.0 if options.check_only else copy_bandwidth(_COPY_NUM_BYTES)
    rows: list[dict[str, object]] = []
    for form in options.formats.split(","):
        tokens = [int(n) for n in options.tokens.split(",")]
        measured = list(_format(form, tokens, copy, align))
        print_table(f"{form} (copy {copy / 1e9:.0f} GB/s)", measured)
        rows += measured
    if options.write:
        what = "experts' feed-forward of a Qwen3-30B-A3B layer, L2-cold, CUDA graphs, medians"
        print(Result(name="moe", what=what, rows=rows, copy_bytes_per_s=copy).write())


def _format(
    form: str, token_counts: list[int], copy: float, align: Align
) -> Iterator[dict[str, object]]:
    """One measurement a number of tokens and routing; only checks where copy is 0."""
    layers = [_layer(form) for _ in range(2 if copy else 1)]
    for num_tokens in token_counts:
        for skewed in (False, True):
            yield _case(form, layers, num_tokens, copy, align, skewed=skewed)


def _case(
    form: str, layers: list[Layer], num_tokens: int, copy: float, align: Align, *, skewed: bool
) -> dict[str, object]:
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    logits = [_logits(num_tokens, skewed=skewed) for _ in range(_num_routes(form, num_tokens))]
    routes = [moe_route(one, ROUTING) for one in logits]
    rows = _rows(x, form)
    twin = _moe_torch(rows, routes[0], *layers[0], torch.bfloat16)
    calls = [
        partial(moe_mlp, rows, routed, *layer, dtype=torch.bfloat16, align=align)
        for routed in routes
        for layer in layers
    ]
    where = f"{form}, {num_tokens} tokens, skewed {skewed}"
    error = require_close(where, calls[0](), twin, LIMITS[form])
    line: dict[str, object] = {
        "format": form,
        "tokens": num_tokens,
        "routing": "skewed" if skewed else "uniform",
        "error": error,
    }
    peers = {peer: peer_call(peer, x, routes[0], *layers[0]) for peer in PEERS}
    for peer, call in peers.items():
        if call is not None:
            require_close(f"{peer}, {where}", call(), twin, _PEER_LIMIT)
    if copy:
        line |= _times(form, x, logits, routes, calls, layers, copy)
        for peer, call in peers.items():
            if call is not None:
                others = [peer_call(peer, x, r, *layer) for r in routes for layer in layers]
                made = [other for other in others if other is not None]
                line[f"{peer}_us"] = round(time_graph(made) * 1e6, 1)
    return line


def _times(
    form: str,
    x: torch.Tensor,
    logits: list[torch.Tensor],
    routes: list[Routed],
    calls: list[partial[torch.Tensor]],
    layers: list[Layer],
    copy: float,
) -> dict[str, object]:
    seconds = time_graph(calls)
    num_experts = sum(len(r.expert_ids.unique()) for r in routes) / len(routes)
    expert_bytes = sum(w.values.nbytes / NUM_EXPERTS for w in layers[0])
    floor = num_experts * expert_bytes / copy
    num_flops = 2 * x.shape[0] * TOP_K * 3 * HIDDEN * INNER
    route = time_graph([partial(moe_route, one, ROUTING) for one in logits])
    line: dict[str, object] = {
        "experts": round(num_experts, 1),
        "us": round(seconds * 1e6, 1),
        "floor_us": round(floor * 1e6, 1),
        "percent_of_floor": round(100 * floor / seconds, 1),
        "tflops": round(num_flops / seconds / 1e12, 1),
        "route_us": round(route * 1e6, 1),
    }
    if form != "plain":
        line["quantise_us"] = round(time_graph([partial(_rows, x, form)]) * 1e6, 1)
    return line


def _num_routes(form: str, num_tokens: int) -> int:
    """Routings whose experts, in two layers, are more than the L2 holds."""
    width = 2 if form == "plain" else 1
    touched = min(NUM_EXPERTS, num_tokens * TOP_K) * 3 * HIDDEN * INNER * width
    return max(1, -(-num_sets(touched) // 2))


def _logits(num_tokens: int, *, skewed: bool) -> torch.Tensor:
    logits = torch.randn(num_tokens, NUM_EXPERTS, device="cuda")
    if skewed:
        logits[:, : NUM_EXPERTS // 8] += _SKEW
    return logits[:, torch.randperm(NUM_EXPERTS, device="cuda")].contiguous()


def _rows(x: torch.Tensor, form: str) -> torch.Tensor | Fp8Rows:
    return x if form == "plain" else quantise(x, GROUP if form == "block" else None)


def _layer(form: str) -> Layer:
    return _experts(2 * INNER, HIDDEN, form), _experts(HIDDEN, INNER, form)


def _experts(num_rows: int, width: int, form: str) -> WeightStack:
    values = torch.randn(NUM_EXPERTS, num_rows, width, device="cuda") * width**-0.5
    if form == "plain":
        return prepare_stack(values.bfloat16())
    if form == "channel":
        rows = quantise(values.flatten(0, 1))
        scales = rows.scales.view(NUM_EXPERTS, num_rows)
        return prepare_stack(rows.values.view(values.shape), scales)
    scales = torch.rand(NUM_EXPERTS, num_rows // GROUP, width // GROUP, device="cuda") / 50 + 0.02
    return prepare_stack((values * 50).to(FP8), scales)


if __name__ == "__main__":
    main()
