"""Routing: the experts and weights of a token follow from its own logits, ties to the lower one."""

from __future__ import annotations

import pytest
import torch

from kernels.moe_routing import Routing, moe_route


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_most_likely_experts_are_chosen(renormalise: bool) -> None:
    logits = torch.randn(50, 16)
    routed = moe_route(logits, Routing(top_k=4, renormalise=renormalise))
    probabilities, expert_ids = torch.softmax(logits.double(), -1).topk(4)
    if renormalise:
        probabilities /= probabilities.sum(-1, keepdim=True)
    assert torch.equal(routed.expert_ids, expert_ids.int())
    torch.testing.assert_close(routed.weights.double(), probabilities, rtol=1e-5, atol=0)


def test_equal_logits_go_to_the_lower_expert() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    routed = moe_route(logits, Routing(top_k=2, renormalise=True))
    assert routed.expert_ids.tolist() == [[1, 2], [0, 1]]
    assert routed.weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("num_experts", [7, 8, 60, 128])
def test_a_tokens_bits_do_not_depend_on_the_others(num_experts: int) -> None:
    logits, routing = torch.randn(200, num_experts) * 3, Routing(top_k=6, renormalise=True)
    whole = moe_route(logits, routing)
    for start, stop in ((0, 1), (0, 2), (3, 8), (77, 78), (10, 113), (199, 200)):
        part = moe_route(logits[start:stop], routing)
        assert torch.equal(part.expert_ids, whole.expert_ids[start:stop])
        assert torch.equal(part.weights, whole.weights[start:stop])


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k: 5; at most 4 experts"):
        moe_route(torch.randn(2, 4), Routing(top_k=5, renormalise=True))
