"""The only door to the kernels: one name per operation, the same signature on every device.

Today every device runs the torch twins; a Triton kernel takes its operation's name over on CUDA.
"""

from kernels.block_digest import block_digest
from kernels.kv_write import kv_write
from kernels.linear import ROW_TILE, exact_tiles, linear
from kernels.paged_attention import Group, exact_rows, make_group, paged_attention, scratch_size
from kernels.rmsnorm import add_rmsnorm, rmsnorm
from kernels.rope import rope, rope_tables
from kernels.sampling import argmax_rows, gumbel_noise
from kernels.silu_mul import silu_mul

__all__ = [
    "ROW_TILE",
    "Group",
    "add_rmsnorm",
    "argmax_rows",
    "block_digest",
    "exact_rows",
    "exact_tiles",
    "gumbel_noise",
    "kv_write",
    "linear",
    "make_group",
    "paged_attention",
    "rmsnorm",
    "rope",
    "rope_tables",
    "scratch_size",
    "silu_mul",
]
