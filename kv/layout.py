"""The bytes of one block. Owns shape and size; never allocates."""

from __future__ import annotations

from dataclasses import dataclass, fields

LAYOUT_VERSION = 1  # part of every model fingerprint: raise it whenever `shape` changes meaning


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """One contiguous block over all layers: [num_kv_heads, num_layers, num_parts, block_tokens,
    head_dim].

    Heads come first, so that a tensor-parallel rank's share is one run of bytes. num_parts is 2: K
    and V; or 1: the compressed latent of multi-head latent attention (MLA), one head of it. With
    scale_num_bytes (quantised KV) a scale for each token stands behind the block_tokens * head_dim
    values of every (head, layer, part).
    """

    num_kv_heads: int
    num_layers: int
    block_tokens: int
    head_dim: int
    dtype_num_bytes: int
    scale_num_bytes: int = 0
    num_parts: int = 2

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            least = 0 if name == "scale_num_bytes" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}; at least {least}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(num_kv_heads, num_layers, num_parts, block_tokens, head_dim)."""
        outer = (self.num_kv_heads, self.num_layers, self.num_parts)
        return (*outer, self.block_tokens, self.head_dim)

    @property
    def num_bytes(self) -> int:
        """Bytes of one block."""
        num_vectors = self.num_kv_heads * self.num_layers * self.num_parts * self.block_tokens
        return num_vectors * (self.head_dim * self.dtype_num_bytes + self.scale_num_bytes)
