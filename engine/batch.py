"""What one step brings to every layer of the decoder.

Owns nothing but the names. Never computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.attention import Attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's ragged batch; on a CPU padded to a multiple of ops.ROW_TILE rows.

    token_ids, positions: [num_rows] int; block_ids, offsets: [num_tokens] int, where the KV of the
    first num_tokens rows goes; the other rows, and those with a negative block, are padding.
    With sources [num_rows] int32, a row whose source is not negative has the token
    sampled[source]. pdl: kernels may be launched under the end of the one before. on_written is
    called when the last kernel that writes KV is enqueued.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    block_ids: torch.Tensor
    offsets: torch.Tensor
    attention: Attention
    sources: torch.Tensor | None = None
    sampled: torch.Tensor | None = None
    pdl: bool = False
    on_written: Callable[[], None] | None = None
