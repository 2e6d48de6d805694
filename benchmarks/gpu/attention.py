"""Times attention over paged KV beside torch's and beside other projects' Triton kernels.

    python -m benchmarks.gpu.attention [--parts decode,prefill] [--check-only] [--write]

Heads as in Qwen3-8B (32 query, 8 KV, 128 wide). Every case is compared with torch in fp32 before it
is timed. Decode's percentages are of the bandwidth of a large copy; torch reads contiguous KV, the
others read blocks. Peers are timed if their files are there, see benchmarks/gpu/attention_peers.py.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import attention_peers as peers
from benchmarks.gpu.timing import (
    Result,
    copy_bandwidth,
    num_sets,
    print_table,
    require_close,
    time_graph,
)
from kernels.attention_plan import (
    SPLIT_TOKENS,
    DecodePlan,
    DecodeWorkspace,
    PrefillPlan,
    decode_plan,
    prefill_plan,
)
from kernels.kv_pages import FP8, KvPages
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import paged_prefill

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 32, 8, 128, 64
GROUP = NUM_HEADS // NUM_KV_HEADS
SCALE = HEAD_DIM**-0.5
DECODE = ((64, 4096), (1, 8192), (256, 512), (256, 448), (64, 448), (16, 1024), (1, 512), (1, 256))
PREFILL = ((8192, 0), (2048, 0), (512, 7680))  # rows, tokens before them
# Rounding of weights and results to 16 bits; of stored values to FP8.
LIMITS = {torch.bfloat16: 6e-3, FP8: 6e-2}

Row = dict[str, object]
Call = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """KV of num_seqs sequences of equal length, once in blocks and once contiguous, per set.

    dense [num_sets, 2, num_seqs, num_kv_heads, length, head_dim] bf16, K and V; sets are layers.
    """

    num_rows: int
    length: int
    dense: torch.Tensor
    pages: KvPages
    table: torch.Tensor
    query: torch.Tensor

    @classmethod
    def make(cls, num_seqs: int, num_rows: int, length: int, dtype: torch.dtype) -> Case:
        """num_rows query tokens a sequence, at the end of its length tokens."""
        num_blocks = length // BLOCK_TOKENS
        per_set = 4 * num_seqs * length * NUM_KV_HEADS * HEAD_DIM
        sets = num_sets(per_set, limit=36)
        shape = (sets, 2, num_seqs, NUM_KV_HEADS, length, HEAD_DIM)
        dense = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        table = torch.randperm(num_seqs * num_blocks, device="cuda").int().view(num_seqs, -1)
        pages = _pages(table.numel(), sets, dtype)
        # [num_seqs, num_blocks, num_kv_heads, sets, 2, block_tokens, head_dim]
        blocked = dense.unflatten(4, (num_blocks, BLOCK_TOKENS)).permute(2, 4, 3, 0, 1, 5, 6)
        for seq, block in itertools.product(range(num_seqs), range(num_blocks)):
            _store(pages, int(table[seq, block]), blocked[seq, block])
        query = torch.randn(num_seqs * num_rows, NUM_HEADS, HEAD_DIM, device="cuda")
        return cls(
            num_rows=num_rows,
            length=length,
            dense=dense,
            pages=pages,
            table=table,
            query=query.bfloat16(),
        )

    @property
    def num_sets(self) -> int:
        """Sets of KV, which are layers of the pages."""
        return self.dense.shape[0]

    def torch_query(self) -> torch.Tensor:
        """[num_seqs, num_heads, num_rows, head_dim], contiguous."""
        return self.query.unflatten(0, (-1, self.num_rows)).transpose(1, 2).contiguous()

    def expected(self) -> torch.Tensor:
        """Of set 0, [num_seqs * num_rows, num_heads * head_dim] fp32, by torch."""
        key, value = self.dense[0].float().repeat_interleave(GROUP, 2)
        mask = torch.ones(self.num_rows, self.length, dtype=torch.bool, device="cuda")
        mask = mask.tril(self.length - self.num_rows)
        query = self.torch_query().float()
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _pages(num_blocks: int, num_layers: int, dtype: torch.dtype) -> KvPages:
    width = HEAD_DIM * 2 if dtype != FP8 else HEAD_DIM + 4
    num_bytes = num_blocks * NUM_KV_HEADS * num_layers * 2 * BLOCK_TOKENS * width
    storage = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    return KvPages.of(storage, (NUM_KV_HEADS, num_layers, 2, BLOCK_TOKENS, HEAD_DIM), dtype)


def _store(pages: KvPages, block: int, values: torch.Tensor) -> None:
    """values [num_kv_heads, num_layers, 2, block_tokens, head_dim]."""
    if pages.scales is None:
        pages.values[block].copy_(values)
        return
    scales = values.float().abs().amax(-1).clamp_min(1e-12) / 448
    pages.scales[block].copy_(scales)
    pages.values[block].copy_((values / scales[..., None]).to(FP8))


def plan_decode(case: Case) -> DecodePlan:
    """All rows see their whole length."""
    num_rows = case.table.shape[0]
    workspace = DecodeWorkspace.allocate(
        max_rows=num_rows,
        max_splits=num_rows * -(-case.length // SPLIT_TOKENS),
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        block_tokens=BLOCK_TOKENS,
        device="cuda",
    )
    lengths = torch.full((num_rows,), case.length, dtype=torch.int32, device="cuda")
    return decode_plan(case.table, lengths, workspace)


def plan_prefill(case: Case) -> PrefillPlan:
    """One sequence, its last rows."""
    start = case.length - case.num_rows
    return prefill_plan(
        case.table, [case.num_rows], [start], group_size=GROUP, block_tokens=BLOCK_TOKENS
    )


def decode_calls(case: Case, dtype: torch.dtype) -> dict[str, Call]:
    """What is timed, by name: each takes the set and returns all rows' results."""
    plan, query = plan_decode(case), case.torch_query()
    calls: dict[str, Call] = {
        "ours": lambda i: paged_decode(case.query, case.pages, i, plan, SCALE),
        "ours, PDL": lambda i: paged_decode(case.query, case.pages, i, plan, SCALE, pdl=True),
    }
    if dtype == FP8:
        return calls
    calls["torch SDPA"] = lambda i: F.scaled_dot_product_attention(
        query, case.dense[i, 0], case.dense[i, 1], enable_gqa=True
    )
    return calls | peers.decode_calls(case.query, case.dense, case.pages, case.table, case.length)


def prefill_calls(case: Case, dtype: torch.dtype) -> dict[str, Call]:
    """As `decode_calls`; torch only without a prefix, for which its causal mask is not made."""
    plan, query = plan_prefill(case), case.torch_query()
    calls: dict[str, Call] = {
        "ours": lambda i: paged_prefill(case.query, case.pages, i, plan, SCALE)
    }
    if dtype == FP8:
        return calls

    def torch_sdpa(backend: SDPBackend) -> Call:
        def call(i: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, case.dense[i, 0], case.dense[i, 1], is_causal=True, enable_gqa=True
                )

        return call

    if case.num_rows == case.length:
        calls["torch SDPA, cuDNN"] = torch_sdpa(SDPBackend.CUDNN_ATTENTION)
        calls["torch SDPA, flash"] = torch_sdpa(SDPBackend.FLASH_ATTENTION)
    return calls | peers.prefill_calls(case.query, case.pages, case.table, case.length)


def check(case: Case, calls: dict[str, Call], dtype: torch.dtype) -> None:
    """Every call against torch in fp32, before anything is timed."""
    expected = case.expected()
    for name, call in calls.items():
        out = call(0)
        assert isinstance(out, torch.Tensor)
        if out.dim() == 4:  # torch's order
            out = out.transpose(1, 2)
        require_close(name, out.reshape(expected.shape), expected, LIMITS[dtype])


def measure(part: str, copy: float, *, check_only: bool) -> Iterator[Row]:
    """Rows of one part; none if only checked."""
    cases = DECODE if part == "decode" else PREFILL
    for dtype, (first, second) in itertools.product((torch.bfloat16, FP8), cases):
        if part == "decode":
            case = Case.make(first, 1, second, dtype)
            calls = decode_calls(case, dtype)
        else:
            case = Case.make(1, first, first + second, dtype)
            calls = prefill_calls(case, dtype)
        check(case, calls, dtype)
        if check_only:
            continue
        for name, call in calls.items():
            bound = [lambda i=i, call=call: call(i) for i in range(case.num_sets)]
            seconds = time_graph(bound, num_replays=9)
            shape = {"sequences": case.table.shape[0], "rows": case.num_rows, "ctx": case.length}
            yield {
                "part": part,
                "kv": str(dtype).removeprefix("torch."),
                **shape,
                "what": name,
                "us": round(seconds * 1e6, 1),
                **_rate(part, case, dtype, seconds, copy),
            }


def _rate(part: str, case: Case, dtype: torch.dtype, seconds: float, copy: float) -> Row:
    if part == "decode":
        width = HEAD_DIM * 2 if dtype != FP8 else HEAD_DIM + 4
        num_bytes = case.table.shape[0] * case.length * NUM_KV_HEADS * 2 * width
        return {"percent_of_copy": round(100 * num_bytes / seconds / copy, 1)}
    before = case.length - case.num_rows
    pairs = case.num_rows * before + case.num_rows * (case.num_rows + 1) / 2
    return {"tflop_per_s": round(4 * NUM_HEADS * HEAD_DIM * pairs / seconds / 1e12)}


def main() -> None:
    """Checks and times, part by part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="decode,prefill")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    copy = 1.0 if options.check_only else copy_bandwidth()
    rows: list[Row] = []
    for part in options.parts.split(","):
        measured = list(measure(part, copy, check_only=options.check_only))
        print_table(f"{part} (copy {copy / 1e9:.0f} GB/s)", measured)
        rows += measured
    if options.write:
        what = "attention over paged KV, 32/8 heads x 128, L2-cold, CUDA graphs, medians"
        print(Result(name="attention", what=what, rows=rows, copy_bytes_per_s=copy).write())


if __name__ == "__main__":
    main()
