"""Cases of the row kernels: add + RMSNorm + FP8, SiLU + FP8, beside their peers.

Owns their inputs, the bytes they must move and their checks. Never times.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.timing import require_close
from kernels.fp8_quant import FP8, Fp8Rows
from kernels.product import Product
from kernels.rmsnorm import _rmsnorm_torch, add_rmsnorm, default_warps, rmsnorm
from kernels.silu_mul import _silu_mul_torch, silu_mul

HIDDEN, INTERMEDIATE = 4096, 12288
EPS = 1e-6
# A step's launches overlap while it is this small.
PDL_ROWS = 256
# Relative errors against the fp32 or twin result: bf16 rounding; e4m3 rounding.
BF16_LIMIT, FP8_LIMIT = 5e-3, 4e-2
PEER = Path(__file__).resolve().parents[2] / ".peers" / "lightllm_rmsnorm.py"

Call = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """make() draws one set of inputs and returns the call on them; num_bytes: least traffic.

    warm: timed with its inputs in L2, where the product that wrote them a moment ago left them.
    """

    name: str
    rows: int
    num_bytes: int
    make: Callable[[], Call]
    check: Callable[[], object] = lambda: None
    warm: bool = False


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random values of unit variance on the GPU."""
    return torch.randn(shape, device="cuda", dtype=dtype)


def wide(out: Any) -> torch.Tensor:
    """The values of a result as fp32."""
    return out.dequantise(torch.float32) if isinstance(out, Fp8Rows) else out.float()


def product_of(rows: int, width: int, num_splits: int) -> Product:
    """A random Product [rows, width] of num_splits parts, scaled by rows and columns."""
    return Product(
        partials=normal(num_splits, rows, width, dtype=torch.float32),
        row_scales=torch.rand(rows, device="cuda"),
        col_scales=torch.rand(width, device="cuda"),
    )


def _norm_case(
    name: str, rows: int, out_bytes: int, run: Callable[..., Any], **kwargs: Any
) -> Case:
    """add + norm (+ quantisation) by run(x, residual, weight); sums cost 2 bytes read twice."""
    splits = kwargs.get("splits", 0)
    weight = normal(HIDDEN)

    def inputs() -> tuple[Any, torch.Tensor]:
        x = product_of(rows, HIDDEN, splits) if splits else normal(rows, HIDDEN)
        return x, normal(rows, HIDDEN)

    def make() -> Call:
        x, residual = inputs()
        return lambda: run(x, residual, weight)

    def check() -> None:
        x, residual = inputs()
        added: torch.Tensor = x.sum(torch.bfloat16) if splits else x
        normed = run(x, residual, weight)
        if isinstance(normed, tuple):
            normed, added = normed[0], added + residual
        expected = _rmsnorm_torch(added.float(), weight.float(), EPS)
        limit = FP8_LIMIT if out_bytes == 1 else BF16_LIMIT
        require_close(name, wide(normed), expected, limit)

    read = (4 * splits or 2) + kwargs.get("residual_bytes", 4)
    num_bytes = rows * HIDDEN * (read + out_bytes)
    warm = kwargs.get("warm", False)
    return Case(name=name, rows=rows, num_bytes=num_bytes, make=make, check=check, warm=warm)


def _eager(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[Any, ...]:
    """The same in torch's own operations: (values, scales, total)."""
    total = x + residual
    normed = F.rms_norm(total, (total.shape[-1],), weight, EPS).float()
    amax = normed.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    return (normed * (448.0 / amax)).to(FP8), amax / 448.0, total


def _torch(function: Callable[..., Any]) -> Callable[..., tuple[Fp8Rows, torch.Tensor]]:
    def run(*inputs: torch.Tensor) -> tuple[Fp8Rows, torch.Tensor]:
        values, scales, total = function(*inputs)
        return Fp8Rows(values=values, scales=scales), total

    return run


def norm_cases() -> Iterator[Case]:
    """add + RMSNorm + per-token FP8, finished input and Product; the norm alone beside peers."""
    for rows in (1, 16, 64, 256, 2048, 8192, 16384):
        options = {"eps": EPS, "pdl": rows <= PDL_ROWS}
        token = functools.partial(add_rmsnorm, quantise="token", **options)
        yield _norm_case("add+norm+fp8", rows, 1, token)
        if rows <= 64:
            yield _norm_case("add+norm+fp8, in L2", rows, 1, token, warm=True)
            for splits in (2, 4):
                name = f"product of {splits}+add+norm+fp8, in L2"
                yield _norm_case(name, rows, 1, token, splits=splits, warm=True)
        if rows in (64, 8192):
            group = functools.partial(add_rmsnorm, quantise="group", **options)
            yield _norm_case("add+norm+fp8 by 128", rows, 1, group)
            plain = functools.partial(add_rmsnorm, **options)
            yield _norm_case("add+norm", rows, 2, plain)
            compiled = _torch(torch.compile(_eager, dynamic=False))
            yield _norm_case("torch eager add+norm+fp8", rows, 1, _torch(_eager))
            yield _norm_case("torch.compile add+norm+fp8", rows, 1, compiled)
        if rows in (1, 64, 8192):
            pdl = rows <= PDL_ROWS
            alone = lambda x, _, w, pdl=pdl: rmsnorm(x, w, EPS, pdl=pdl)  # noqa: E731
            yield _norm_case("norm", rows, 2, alone, residual_bytes=0)
            if PEER.exists():
                theirs = _lightllm()
                peer = lambda x, _, w, f=theirs: f(x, w, EPS)  # noqa: E731
                yield _norm_case("LightLLM norm", rows, 2, peer, residual_bytes=0)


def _lightllm() -> Callable[..., torch.Tensor]:
    spec = importlib.util.spec_from_file_location("lightllm_rmsnorm", PEER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rmsnorm_forward


def silu_cases() -> Iterator[Case]:
    """SiLU * up + FP8, finished gate_up and Products."""
    variants = [("silu+fp8", "token", 0), ("silu+fp8 by 128", "group", 0), ("silu", None, 0)]
    variants += [("silu+fp8, in L2", "token", 0), ("product of 2+silu+fp8, in L2", "token", 2)]
    for rows in (1, 16, 64, 256, 8192):
        for name, kind, splits in variants:
            warm = name.endswith("in L2")
            if warm and rows > 64:
                continue
            run = functools.partial(
                silu_mul, quantise=kind, dtype=torch.bfloat16, pdl=rows <= PDL_ROWS
            )

            def inputs(rows: int = rows, splits: int = splits) -> Any:
                width = 2 * INTERMEDIATE
                return product_of(rows, width, splits) if splits else normal(rows, width)

            def check(run: Any = run, inputs: Any = inputs, kind: str | None = kind) -> None:
                x = inputs()
                finished = x.sum(torch.bfloat16) if isinstance(x, Product) else x
                limit = FP8_LIMIT if kind else BF16_LIMIT
                require_close("silu", wide(run(x)), _silu_mul_torch(finished.float()), limit)

            num_bytes = rows * INTERMEDIATE * (2 * (4 * splits or 2) + (1 if kind else 2))
            make = lambda run=run, inputs=inputs: functools.partial(run, inputs())  # noqa: E731
            yield Case(name=name, rows=rows, num_bytes=num_bytes, make=make, check=check, warm=warm)


def warps_cases() -> Iterator[Case]:
    """add + norm + FP8 at every warp count that may win: what the table is made of."""
    for width in (1024, 2048, 4096, 8192):
        weight = normal(width)
        for rows in (1, 64, 256, 8192):
            for warps in (1, 2, 4, 8, 16, 32):
                if not 4 <= width // (32 * warps) <= 128:
                    continue

                def make(
                    width: int = width, rows: int = rows, warps: int = warps, w: Any = weight
                ) -> Call:
                    x, residual = normal(rows, width), normal(rows, width)
                    options: Any = {"quantise": "token", "warps": warps, "pdl": rows <= PDL_ROWS}
                    return lambda: add_rmsnorm(x, residual, w, EPS, **options)

                star = "*" if warps == default_warps(width, rows) else ""
                num_bytes = 7 * rows * width
                yield Case(
                    name=f"{width} w{warps}{star}", rows=rows, num_bytes=num_bytes, make=make
                )
