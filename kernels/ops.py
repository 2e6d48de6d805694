"""The only door to the kernels: one name per operation, the same signature on every device.

cuda: Triton; cpu: torch twins.
"""

from kernels.attention_plan import (
    EMPTY_TILE,
    SPLIT_TOKENS,
    DecodePlan,
    DecodeWorkspace,
    PrefillPlan,
    decode_plan,
    decode_workspace_size,
    max_decode_splits,
    prefill_plan,
    prefill_tile_tokens,
    prefill_tiles,
)
from kernels.block_digest import block_digest
from kernels.embedding import embed
from kernels.fp8_quant import GROUP, Fp8Rows, Quantise, quantise
from kernels.fused_qkv import qkv_finish
from kernels.kv_pages import KvPages
from kernels.kv_write import kv_write, write_pages
from kernels.linear import ROW_TILE, exact_tiles, linear, prepare_weight
from kernels.moe_align import ALIGN_SOURCES, Align, alignment, moe_align
from kernels.moe_gemm import moe_mlp
from kernels.moe_routing import Routed, Routing, moe_route
from kernels.paged_attention import Group, exact_rows, make_group, paged_attention, scratch_size
from kernels.paged_decode import DecodeConfig, paged_decode
from kernels.paged_prefill import paged_prefill
from kernels.product import Product
from kernels.rmsnorm import add_rmsnorm, rmsnorm
from kernels.rope import rope, rope_tables
from kernels.sampling import argmax_rows, gumbel_noise
from kernels.silu_mul import silu_mul
from kernels.step_times import publish, stamp
from kernels.table_update import update_table
from kernels.tiles import TileTables, attention_key, width_key
from kernels.weight import Weight
from kernels.weight_stack import WeightStack, prepare_stack, stacked_linear

__all__ = [
    "ALIGN_SOURCES",
    "EMPTY_TILE",
    "GROUP",
    "ROW_TILE",
    "SPLIT_TOKENS",
    "Align",
    "DecodeConfig",
    "DecodePlan",
    "DecodeWorkspace",
    "Fp8Rows",
    "Group",
    "KvPages",
    "PrefillPlan",
    "Product",
    "Quantise",
    "Routed",
    "Routing",
    "TileTables",
    "Weight",
    "WeightStack",
    "add_rmsnorm",
    "alignment",
    "argmax_rows",
    "attention_key",
    "block_digest",
    "decode_plan",
    "decode_workspace_size",
    "embed",
    "exact_rows",
    "exact_tiles",
    "gumbel_noise",
    "kv_write",
    "linear",
    "make_group",
    "max_decode_splits",
    "moe_align",
    "moe_mlp",
    "moe_route",
    "paged_attention",
    "paged_decode",
    "paged_prefill",
    "prefill_plan",
    "prefill_tile_tokens",
    "prefill_tiles",
    "prepare_stack",
    "prepare_weight",
    "publish",
    "qkv_finish",
    "quantise",
    "rmsnorm",
    "rope",
    "rope_tables",
    "scratch_size",
    "silu_mul",
    "stacked_linear",
    "stamp",
    "update_table",
    "width_key",
    "write_pages",
]
