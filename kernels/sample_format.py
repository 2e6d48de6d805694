"""What the row sampler reads and writes: packed words, flags and the buffers that hold them.

Owns the layout of the control words that a step uploads and of the results that come back. Never
samples; memory is allocated here once and stays where it is, so that CUDA graphs may keep it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 4096  # tokens that a program scans at a time; bits depend on it, so it follows V alone
MAX_TILES = 63  # a row's tiles are bits of a word; a larger vocabulary has larger tiles
HEAD = 32  # tokens that share one entry of `heads`
MAX_PICKED = 128  # largest top_k and number of alternatives that is settled on chip
MAX_LISTED = 2048  # largest top_k for which runs of ids are listed instead of searching the row
MAX_TOP = 20  # alternatives reported per row, as protos/gateway.proto allows
HEADER = 4  # words before the first row; word 0 is the number of rows


class Field(enum.IntEnum):
    """Place of a row's words; floats as their bits, 64-bit values as low and high word."""

    LOGITS_ROW = 0
    FLAGS = 1
    TEMPERATURE = 2  # float; 0 is greedy
    TOP_K = 3  # 0 is off
    TOP_P = 4  # float; 1 is off
    LEAST = 5  # float; log(min_p), -inf is off
    SEED = 6  # two words
    POSITION = 8
    TOKEN = 9  # what is left when every token is barred; with Flag.GIVEN the token itself
    NUM_TOP = 10  # alternatives, with Flag.LOGPROBS
    BARRED = 11  # first word of the barred ids, from the start of the control words
    NUM_BARRED = 12
    REPETITION = 13  # float
    PRESENCE = 14  # float
    FREQUENCY = 15  # float
    COUNTS = 16  # two words: address of counts int32 [vocab_size], or 0
    BIAS = 18  # two words: address of bias fp32 [vocab_size], or 0
    NUM_FIELDS = 20


class Flag(enum.IntFlag):
    """What a row asks for beyond a token."""

    ADJUSTED = 1  # bias, bars or penalties apply
    COUNTED = 2  # the token is added to the row's counts
    LOGPROBS = 4  # log probability, rank and alternatives are reported
    GIVEN = 8  # nothing is drawn: the token is given, its log probability is asked for


class Status(enum.IntFlag):
    """What a row's report says beside its token."""

    BAD = 1  # logits hold NaN or +inf; the token is 0 and means nothing
    EMPTY = 2  # every token is barred or -inf; the token is Field.TOKEN


PROMPT_BIT = 1 << 24
"""Set in a token's count word when the prompt holds it; the bits below count outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleBuffers:
    """Device memory of one sampler, for at most max_rows rows a launch.

    control int32 [HEADER + max_rows * NUM_FIELDS + num_list_words]: header, rows, barred ids.
    tokens int32 [max_rows]; report int32 [max_rows, 4]: token, status, bits of the log probability,
    rank; top int32 [max_rows, MAX_TOP, 2]: id and bits of the log probability.
    Scratch: sums fp32 [max_rows, 3, tiles], ids int32 [max_rows, 2, tiles], heads fp32 [max_rows,
    num_heads], picked int32 [max_rows, MAX_LISTED], counters int32 [max_rows] (zero between
    launches). `states` finds count and bias tensors by address, for the twin.
    """

    vocab_size: int
    max_rows: int
    block: int
    control: Tensor
    tokens: Tensor
    report: Tensor
    top: Tensor
    sums: Tensor
    ids: Tensor
    heads: Tensor
    picked: Tensor
    counters: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls,
        vocab_size: int,
        max_rows: int,
        device: torch.device,
        *,
        num_list_words: int = 0,
        block: int = BLOCK,
    ) -> SampleBuffers:
        """Buffers for one vocabulary; block (a power of two >= HEAD) is smaller in tests only."""
        while vocab_size > MAX_TILES * block:
            block *= 2
        num_tiles = 1 << max(0, (-(-vocab_size // block) - 1).bit_length())
        num_heads = -(-vocab_size // HEAD)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            vocab_size=vocab_size,
            max_rows=max_rows,
            block=block,
            control=zeros(HEADER + max_rows * Field.NUM_FIELDS + num_list_words),
            tokens=zeros(max_rows),
            report=zeros(max_rows, 4),
            top=zeros(max_rows, MAX_TOP, 2),
            sums=zeros(max_rows, 3, num_tiles, dtype=torch.float32),
            ids=zeros(max_rows, 2, num_tiles),
            heads=zeros(max_rows, num_heads, dtype=torch.float32),
            picked=zeros(max_rows, MAX_LISTED),
            counters=zeros(max_rows),
        )
