"""Routing: the experts and weights of a token follow from its own logits, ties to the lower one."""

from __future__ import annotations

from typing import Any, Literal

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


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_experts", [7, 8, 60, 128])
def test_a_tokens_bits_do_not_depend_on_the_others(
    num_experts: int, scoring: Literal["softmax", "sigmoid"]
) -> None:
    logits, routing = (
        torch.randn(200, num_experts) * 3,
        Routing(top_k=6, renormalise=True, scoring=scoring),
    )
    whole = moe_route(logits, routing)
    for start, stop in ((0, 1), (0, 2), (3, 8), (77, 78), (10, 113), (199, 200)):
        part = moe_route(logits[start:stop], routing)
        assert torch.equal(part.expert_ids, whole.expert_ids[start:stop])
        assert torch.equal(part.weights, whole.weights[start:stop])


def test_only_the_best_groups_are_chosen_from() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0, 6.0, 6.0, 6.0, 8.0, 1.0, 2.0]]).log()
    choose = {"top_k": 3, "renormalise": False, "num_groups": 3, "top_groups": 1}
    by_best = moe_route(logits, Routing(**choose, group_score="max"))
    by_two = moe_route(logits, Routing(**choose, group_score="top2"))
    assert by_best.expert_ids.tolist() == [[0, 1, 2]]
    assert by_two.expert_ids.tolist() == [[3, 4, 5]]


def test_bias_decides_the_choice_and_not_the_weight() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 1.0])
    sigmoid = Routing(top_k=2, renormalise=False, scoring="sigmoid", scale=2.0)
    routed = moe_route(logits, sigmoid, bias)
    assert routed.expert_ids.tolist() == [[2, 0]]
    expected = torch.sigmoid(torch.tensor([[0.0, 2.0]])) * 2
    torch.testing.assert_close(routed.weights, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k: 9; 1 to 8 experts"),
        ({"top_k": 5, "num_groups": 4, "top_groups": 2}, "top_k: 5; 1 to 4 experts"),
        ({"num_groups": 3}, "num_groups: 3; a divisor of 8 experts"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups: 3; 1 to num_groups 2"),
        ({"num_groups": 8, "top_groups": 4, "group_score": "top2"}, "groups of 2 experts"),
    ],
)
def test_what_does_not_fit_the_experts_is_refused(changes: dict[str, Any], message: str) -> None:
    routing = Routing(**{"top_k": 2, "renormalise": True, **changes})
    with pytest.raises(ValueError, match=message):
        moe_route(torch.randn(2, 8), routing)
