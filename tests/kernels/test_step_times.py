"""A step's report: tokens behind the stamps, stamps in order."""

from __future__ import annotations

import torch

from kernels import step_times
from kernels.step_times import BEGIN, END, FORWARD, NUM_STAMPS


def test_tokens_stand_behind_the_stamps() -> None:
    token_ids = torch.arange(300, dtype=torch.int32) * 7
    made, twin = torch.full((400,), -1), torch.full((400,), -1)
    step_times._launch_triton(made, token_ids, 300, END, pdl=False)
    step_times.publish(twin, token_ids)
    assert torch.equal(made[NUM_STAMPS:], twin[NUM_STAMPS:])
    assert torch.equal(made[NUM_STAMPS : NUM_STAMPS + 300], token_ids.long())


def test_stamps_follow_each_other() -> None:
    report = torch.zeros(10, dtype=torch.int64)
    step_times.stamp(report, BEGIN)
    step_times.stamp(report, FORWARD)
    step_times.publish(report, torch.tensor([5]))
    assert 0 < report[BEGIN] <= report[FORWARD] <= report[END] and report[NUM_STAMPS] == 5
