"""The bytes of one block. Owns shape and size; never allocates."""

from __future__ import annotations

from dataclasses import dataclass, fields

LAYOUT_VERSION = 1  # part of every model fingerprint: raise it whenever `shape` changes meaning


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """One contiguous block over all layers: [num_kv_heads, num_layers, 2, block_tokens, head_dim].

    Heads come first, so that a tensor-parallel rank's share is one run of bytes; axis 2 is K, V.
    With scale_num_bytes (quantised KV) a scale for each token stands behind the block_tokens *
    head_dim values of every (head, layer, K or V).
    """

    num_kv_heads: int
    num_layers: int
    block_tokens: int
    head_dim: int
    dtype_num_bytes: int
    scale_num_bytes: int = 0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            least = 0 if name == "scale_num_bytes" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}; at least {least}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(num_kv_heads, num_layers, 2, block_tokens, head_dim)."""
        return (self.num_kv_heads, self.num_layers, 2, self.block_tokens, self.head_dim)

    @property
    def num_bytes(self) -> int:
        """Bytes of one block."""
        num_vectors = self.num_kv_heads * self.num_layers * 2 * self.block_tokens
        return num_vectors * (self.head_dim * self.dtype_num_bytes + self.scale_num_bytes)
