"""The digest without torch is the one that workers seal with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import ops
from kv.digest import block_digest


@pytest.mark.parametrize("num_bytes", [8, 64, 4096, 16_384 * 8, 16_384 * 8 + 24, 3 * 2**20 + 8])
def test_it_is_the_workers_digest(num_bytes: int) -> None:
    data = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8)
    expected = ops.block_digest(torch.from_numpy(data)[None])
    assert [block_digest(memoryview(data.tobytes()))] == expected


def test_ragged_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="12 bytes; the digest needs a multiple of 8"):
        block_digest(memoryview(bytes(12)))
