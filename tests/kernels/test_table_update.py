"""Changed entries of a table, Triton as the twin."""

from __future__ import annotations

import torch

from kernels import table_update


def test_only_listed_places_change() -> None:
    table = torch.arange(40 * 64, dtype=torch.int32).view(40, 64)
    places = torch.randperm(table.numel())[:300].int()
    changes = torch.full((1 + 2 * 700,), -7, dtype=torch.int32)
    changes[0] = 300
    changes[1:601] = torch.stack((places, places + 100_000), dim=1).flatten()
    expected = table.clone()
    expected.view(-1)[places.long()] = places + 100_000
    made = table.clone()
    table_update.update_table(made, changes)
    assert torch.equal(made, expected)
    table_update._launch_triton(table, changes)
    assert torch.equal(table, expected)
    changes[0] = 0
    table_update.update_table(made, changes)
    assert torch.equal(made, expected)
