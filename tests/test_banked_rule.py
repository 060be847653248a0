"""Algorithm 1 as training runs it: what stands in the place of a block, and noise on the gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edit_compile import RoutingPolicy
from edit_compile.training.banked import BankedRule, Held


def rule_of(probabilities: list[float], reused: list[int], **changes: Any) -> tuple[BankedRule, Tensor, Tensor]:
    """A rule that has decided on rows with these p, its g, and the logits."""
    held = Held([torch.full((len(reused), 1, 1), 7.0)], torch.tensor(reused))
    policy = RoutingPolicy(**{"threshold": 0.5, "margin": 0.2, "max_reuse": 2} | changes)
    rule = BankedRule(policy, 0, {0: held})
    logits = torch.logit(torch.tensor(probabilities)).requires_grad_()
    return rule, rule.gate(0, logits, None)[1], logits


def test_what_stands_in_the_place_of_a_block() -> None:
    rule, g, logits = rule_of([0.4, 0.6, 0.6, 0.6, 0.9, 0.9], [0, 0, 2, -1, 1, -1])
    assert g.tolist() == [0, 0, 1, 1, 1, 1]
    (instead,) = rule.residuals(0, [torch.full((6, 1, 1), 3.0)], lambda _, value: value.reshape(-1, 1, 1))
    assert instead.flatten().tolist() == [0, 7, 0, 0, 7, 0]
    assert rule.after[0].reused.tolist() == [0, 1, 0, 0, 0, 0]
    assert rule.after[0].residuals[0].flatten().tolist() == [7, 7, 3, 3, 3, 3]
    g.sum().backward()
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, p * (1 - p))


@pytest.mark.parametrize("changes", [{"margin": 0.0}, {"max_reuse": 0}, {"warmup_steps": 1}])
def test_nothing_is_reused_where_the_policy_reuses_nothing(changes: dict[str, Any]) -> None:
    rule, g, _ = rule_of([0.4, 0.6, 0.9], [0, 0, 0], **changes)
    assert g.tolist() == [0, 1, 1]
    (instead,) = rule.residuals(0, [torch.full((3, 1, 1), 3.0)], lambda _, value: value.reshape(-1, 1, 1))
    assert instead.flatten().tolist() == [0, 0, 0]


def test_noise_opens_a_gate_with_its_probability_and_is_drawn_once() -> None:
    torch.manual_seed(0)
    rule = BankedRule(RoutingPolicy(margin=0.0), 0, {}, noise=1.0)
    logits = torch.logit(torch.full((20_000,), 0.3))
    _, g = rule.gate(0, logits, None)
    assert float(g.mean()) == pytest.approx(0.3, abs=0.015)
    assert torch.equal(g, rule.gate(0, logits, None)[1])
    chosen = rule.width(0, torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4])).expand(20_000, 4), None)[1]
    torch.testing.assert_close(chosen.mean(0), torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.015, rtol=0)
