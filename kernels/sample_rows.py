"""One token per row from logits, each row in its own mode: dispatch, launcher and torch twin.

Owns the choice between the Triton kernel (CUDA) and the twin. Never packs requests: the rows'
parameters are words that engine/gpu_sampler.py writes (kernels/sample_format.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import sampling
from kernels.sample_format import (
    HEAD,
    HEADER,
    MAX_LISTED,
    MAX_PICKED,
    MAX_TOP,
    PROMPT_BIT,
    Field,
    Flag,
    SampleBuffers,
    Status,
)
from kernels.sample_kernel import sample_rows_kernel

_FEW_ROWS = 8
_NUM_WARPS = 16
_MAX_REGISTERS = 64  # two programs fit a multiprocessor; only filters spill
_TILES_PER_PART = 4


def sample_rows(
    logits: Tensor, buffers: SampleBuffers, num_rows: int, *, pdl: bool = False
) -> None:
    """Samples the first num_rows rows of buffers.control into buffers.tokens, report and top.

    logits [num_logits_rows, vocab_size] fp32, bf16 or fp16, rows contiguous, is left as it is;
    rows beyond control's own number of rows are passed over, so one launch serves a bucket. On
    CUDA nothing is read on the host and memory stays in place: the launch can be captured.
    ValueError for a wrong shape or number of rows.
    """
    if logits.ndim != 2 or logits.shape[1] != buffers.vocab_size or logits.stride(1) != 1:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, strides {logits.stride()}")
    if not 0 < num_rows <= buffers.max_rows:
        raise ValueError(f"num_rows: {num_rows}; 1 to {buffers.max_rows}")
    if logits.is_cuda:
        launch_triton(logits, buffers, num_rows, pdl=pdl)
    else:
        _twin(logits, buffers, num_rows)


def launch_triton(
    logits: Tensor,
    buffers: SampleBuffers,
    num_rows: int,
    *,
    tiles_per_part: int | None = None,
    pdl: bool = False,
) -> None:
    """Launches the kernel; tiles_per_part (tiles a program scans) changes no bit."""
    num_tiles = -(-buffers.vocab_size // buffers.block)
    if tiles_per_part is None:
        tiles_per_part = 1 if num_rows <= _FEW_ROWS else _TILES_PER_PART
    options: dict[str, Any] = {
        "VOCAB": buffers.vocab_size,
        "BLOCK": buffers.block,
        "TILES_PER_PART": tiles_per_part,
        "TILES_PAD": buffers.sums.shape[-1],
        "HEAD": HEAD,
        "HEADS_PAD": triton.next_power_of_2(buffers.heads.shape[-1]),
        "MAX_PICKED": MAX_PICKED,
        "MAX_LISTED": MAX_LISTED,
        "MAX_TOP": MAX_TOP,
        "HEADER": HEADER,
        "PDL": pdl,
        "num_warps": _NUM_WARPS,
        "maxnreg": _MAX_REGISTERS,
        "enable_fp_fusion": False,  # the same bits in every variant of the kernel
    }
    if pdl:
        options["launch_pdl"] = True
    sample_rows_kernel[(-(-num_tiles // tiles_per_part), num_rows)](
        logits, buffers.control, buffers.tokens, buffers.report, buffers.top,
        buffers.sums, buffers.ids, buffers.heads, buffers.picked, buffers.counters,
        logits.stride(0), **options,
    )  # fmt: skip


def _twin(logits: Tensor, buffers: SampleBuffers, num_rows: int) -> None:
    words = buffers.control.tolist()
    hashes = sampling.token_hashes(buffers.vocab_size, logits.device)
    for row in range(min(num_rows, words[0])):
        start = HEADER + row * Field.NUM_FIELDS
        fields = words[start : start + Field.NUM_FIELDS]
        bits = buffers.control[start : start + Field.NUM_FIELDS].view(torch.float32).tolist()
        raw = logits[fields[Field.LOGITS_ROW]].float()
        flags = Flag(fields[Field.FLAGS])
        values = _adjusted(raw, fields, bits, words, buffers) if Flag.ADJUSTED in flags else raw
        token, status = _choose(raw, values, fields, bits, hashes)
        report = buffers.report[row]
        if Flag.LOGPROBS in flags and not status:
            _report(values, token, fields[Field.NUM_TOP], report, buffers.top[row])
        buffers.tokens[row] = report[0] = token
        report[1] = int(status)
        if Flag.COUNTED in flags and Status.BAD not in status:
            buffers.states[_address(fields, Field.COUNTS)][token] += 1


def _choose(
    raw: Tensor, values: Tensor, fields: list[int], bits: list[float], hashes: Tensor
) -> tuple[int, Status]:
    if not bool((raw < math.inf).all()):
        return 0, Status.BAD
    largest, token = sampling.argmax_rows(values[None])
    if largest.item() == -math.inf:
        return fields[Field.TOKEN], Status.EMPTY
    if fields[Field.FLAGS] & Flag.GIVEN:
        return fields[Field.TOKEN], Status(0)
    if bits[Field.TEMPERATURE] <= 0.0:
        return int(token), Status(0)
    scaled = sampling.scale(values[None], [bits[Field.TEMPERATURE]])
    min_p = math.exp(bits[Field.LEAST])
    sampling.filter_row(scaled[0], fields[Field.TOP_K], bits[Field.TOP_P], min_p)
    key = sampling.stream_key(_address(fields, Field.SEED), fields[Field.POSITION])
    return int(sampling.draw(scaled, sampling.gumbel_noise(hashes, [key]))), Status(0)


def _adjusted(
    raw: Tensor, fields: list[int], bits: list[float], words: list[int], buffers: SampleBuffers
) -> Tensor:
    values = raw.clone()
    bias, counts = _address(fields, Field.BIAS), _address(fields, Field.COUNTS)
    if bias:
        values += buffers.states[bias]
    start = fields[Field.BARRED]
    sampling.apply_masks(values, (), words[start : start + fields[Field.NUM_BARRED]])
    if counts:
        word = buffers.states[counts]
        penalty = bits[Field.REPETITION]
        repeated = torch.where(values > 0, values / penalty, values * penalty)
        values = torch.where(word != 0, repeated, values)
        count = (word & (PROMPT_BIT - 1)).float()
        lowered = values - (count * bits[Field.FREQUENCY] + bits[Field.PRESENCE])
        values = torch.where(count > 0, lowered, values)
    return values


def _report(values: Tensor, token: int, num_top: int, report: Tensor, top: Tensor) -> None:
    logprobs = (values.double() - sampling.log_normalizers(values[None])).float()
    report[2] = logprobs[token].view(torch.int32)
    report[3] = sampling.ranks(values[None], torch.tensor([token], device=values.device))[0]
    best = torch.topk(sampling.order_keys(values), num_top).indices
    top[:num_top, 0] = best.int()
    top[:num_top, 1] = logprobs[best].view(torch.int32)


def _address(fields: list[int], place: int) -> int:
    """The unsigned 64-bit value of two words."""
    return (fields[place] & 0xFFFFFFFF) | (fields[place + 1] & 0xFFFFFFFF) << 32
