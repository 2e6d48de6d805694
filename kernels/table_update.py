"""Changes to block tables that stay on the device: few entries a step instead of all of them.

Owns the form of a list of changes. Never knows whose blocks they are.
"""

# Triton's jit is beyond the type checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 256


def update_table(table: torch.Tensor, changes: torch.Tensor, *, pdl: bool = False) -> None:
    """Writes changes [1 + 2 * limit] int32 into table [num_rows, width] int32, in place.

    changes: how many there are, then pairs (row * width + column, value), no place twice. On CUDA
    the number is read on the device, so that the launch can be captured.
    """
    if table.is_cuda:
        _launch_triton(table, changes, pdl=pdl)
        return
    pairs = changes[1 : 1 + 2 * int(changes[0])].view(-1, 2)
    table.view(-1)[pairs[:, 0].long()] = pairs[:, 1]


def _launch_triton(table: torch.Tensor, changes: torch.Tensor, *, pdl: bool = False) -> None:
    limit = (changes.shape[0] - 1) // 2
    _update_kernel[(triton.cdiv(limit, _BLOCK),)](
        table, changes, BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl
    )


@triton.jit
def _update_kernel(table_ptr, changes_ptr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = lanes < tl.load(changes_ptr)
    place = tl.load(changes_ptr + 1 + 2 * lanes, mask=kept, other=0)
    value = tl.load(changes_ptr + 2 + 2 * lanes, mask=kept, other=0)
    tl.store(table_ptr + place, value, mask=kept)
