"""Where a step's time goes, told by the device: stamps of its clock among the step's kernels.

Owns the form of a step's report: three stamps and the sampled tokens, in one buffer that one copy
brings to the host. Never waits for anything.
"""

# Triton's jit is beyond the type checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import time

import torch
import triton
import triton.language as tl

BEGIN, FORWARD, END = 0, 1, 2
"""Places of the stamps: before the first kernel, after the last norm, after sampling."""

NUM_STAMPS = 3


def stamp(report: torch.Tensor, place: int, *, pdl: bool = False) -> None:
    """Writes the present nanosecond to report[place]; report [NUM_STAMPS + num_tokens] int64."""
    if report.is_cuda:
        _launch_triton(report, report, 0, place, pdl=pdl)
    else:
        report[place] = time.perf_counter_ns()


def publish(report: torch.Tensor, token_ids: torch.Tensor, *, pdl: bool = False) -> None:
    """Writes token_ids [num_tokens] int behind the stamps, and the END stamp."""
    if report.is_cuda:
        _launch_triton(report, token_ids, token_ids.shape[0], END, pdl=pdl)
    else:
        report[NUM_STAMPS : NUM_STAMPS + token_ids.shape[0]] = token_ids
        report[END] = time.perf_counter_ns()


def _launch_triton(
    report: torch.Tensor, token_ids: torch.Tensor, num_tokens: int, place: int, *, pdl: bool
) -> None:
    _report_kernel[(1,)](
        report,
        token_ids,
        num_tokens,
        place,
        NUM_STAMPS=NUM_STAMPS,
        BLOCK=256,
        CLOCK=report.is_cuda,
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )


@triton.jit(do_not_specialize=["num_tokens", "place"])
def _report_kernel(
    report_ptr,
    token_ids_ptr,
    num_tokens,
    place,
    NUM_STAMPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for start in range(0, num_tokens, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        token_ids = tl.load(token_ids_ptr + lanes, mask=lanes < num_tokens)
        target = report_ptr + NUM_STAMPS + lanes
        tl.store(target, token_ids.to(tl.int64), mask=lanes < num_tokens)
    if CLOCK:
        tl.store(report_ptr + place, tl.extra.cuda.globaltimer().to(tl.int64))
