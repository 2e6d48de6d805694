"""What the attention of a step looks at: made once per step, asked once per layer.

Owns which kernel serves which rows. A row at an output's position always goes through decode
attention and one at a prompt's position through prefill attention, so that a token's bits depend
neither on the step it is computed in nor on whether it is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kernels import ops


class Attention(Protocol):
    """Attention over the pages of one layer."""

    def attend(
        self, query: torch.Tensor, pages: ops.KvPages, layer: int, scale: float
    ) -> torch.Tensor:
        """query [num_rows, num_heads, head_dim] -> [num_rows, num_heads * head_dim]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAttention:
    """On a CPU: groups cover the rows of all tokens; other rows are padding.

    used [num_used] int64, for quantised pages: the blocks that the groups' tables count from 0;
    of a layer, these are brought to fp32 first.
    """

    groups: list[ops.Group]
    used: torch.Tensor | None = None

    def attend(
        self, query: torch.Tensor, pages: ops.KvPages, layer: int, scale: float
    ) -> torch.Tensor:
        """As Attention."""
        values = pages.values
        if self.used is not None:
            assert pages.scales is not None
            # [num_used, num_kv_heads, 1, 2, block_tokens, head_dim]
            values = values[:, :, layer : layer + 1][self.used].float()
            values *= pages.scales[:, :, layer : layer + 1][self.used][..., None]
            layer = 0
        return ops.paged_attention(query, values, layer, self.groups, scale).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedAttention:
    """On a GPU: the first num_decode rows see what `decode` says, the others what `prefill` says.

    prefill's tiles count rows from the first row after those of decode.
    """

    num_decode: int
    decode: ops.DecodePlan | None = None
    decode_config: ops.DecodeConfig | None = None
    prefill: ops.PrefillPlan | None = None
    pdl: bool = False

    def attend(
        self, query: torch.Tensor, pages: ops.KvPages, layer: int, scale: float
    ) -> torch.Tensor:
        """As Attention."""
        parts: list[torch.Tensor] = []
        if self.decode is not None:
            rows = query[: self.num_decode]
            options = {"pdl": self.pdl, "config": self.decode_config}
            parts.append(ops.paged_decode(rows, pages, layer, self.decode, scale, **options))
        if self.prefill is not None:
            rows = query[self.num_decode :]
            parts.append(ops.paged_prefill(rows, pages, layer, self.prefill, scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
