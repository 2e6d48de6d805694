"""Token embeddings: host tokens, tokens of the step before, Triton as the twin."""

from __future__ import annotations

import pytest
import torch

from kernels import embedding


@pytest.mark.parametrize("width", [48, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_the_twin(width: int, dtype: torch.dtype) -> None:
    weight = torch.randn(50, width).to(dtype)
    token_ids = torch.tensor([3, -1, 49, -1, 0], dtype=torch.int32)
    sources = torch.tensor([-1, 2, -1, 0, -1], dtype=torch.int32)
    sampled = torch.tensor([7, 8, 9])
    out = embedding.embed(token_ids, weight, sources, sampled)
    assert torch.equal(out, weight[[3, 9, 49, 7, 0]])
    assert torch.equal(embedding._launch_triton(token_ids, weight, sources, sampled), out)
    known = torch.tensor([3, 4])
    assert torch.equal(embedding.embed(known, weight), weight[[3, 4]])
    assert torch.equal(embedding._launch_triton(known, weight, None, None), weight[[3, 4]])
