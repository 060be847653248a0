"""Straight-through decisions and the budget losses (equations 7-9, 13-15)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edit_compile.elastic.straight_through import Routing, channel_mask, choose_width, gate
from edit_compile.training.losses import PRESETS, Budget, budget_losses, gate_loss, width_loss
from passes.mlp.weights import site_rows

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def routing_of(gate_logits: torch.Tensor, width_logits: torch.Tensor) -> Routing:
    probability, hard = gate(gate_logits)
    soft, choice = choose_width(width_logits)
    return Routing(probability, hard, soft, choice, WIDTHS)


def test_gate_is_hard_in_value_and_sigmoid_in_gradient():
    logit = torch.tensor([-3.0, -0.01, 0.0, 0.01, 3.0], requires_grad=True)
    probability, hard = gate(logit)
    assert hard.tolist() == [0, 0, 1, 1, 1]
    hard.sum().backward()
    torch.testing.assert_close(logit.grad, (probability * (1 - probability)).detach())


def test_width_choice_is_one_hot_with_the_gradient_of_softmax():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    soft, choice = choose_width(logits)
    assert choice.detach().sort(dim=1).values.tolist() == [[0, 0, 0, 1]] * 5
    assert torch.equal(choice.argmax(1), logits.argmax(1))
    weights = torch.tensor(WIDTHS)
    (gradient,) = torch.autograd.grad((choice @ weights).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((soft @ weights).sum(), logits)
    torch.testing.assert_close(gradient, expected)


@given(hidden=st.integers(1, 600), width=st.sampled_from(WIDTHS), start=st.integers(0, 9), rest=st.integers(0, 9))
def test_mask_keeps_the_first_channels_of_the_mlp_and_all_others(hidden, width, start, rest):
    choice = torch.eye(4)[[WIDTHS.index(width)]]
    mask = channel_mask(choice, WIDTHS, start, hidden, start + hidden + rest)[0]
    kept = math.ceil(width * hidden)
    assert site_rows(hidden, width) == kept
    assert mask.tolist() == [1.0] * (start + kept) + [0.0] * (hidden - kept) + [1.0] * rest


@pytest.mark.parametrize("hard", [True, False])
def test_losses_against_their_equations(hard):
    generator = torch.Generator().manual_seed(1)
    routing = routing_of(torch.randn(6, 3, generator=generator), torch.randn(6, 3, 4, generator=generator))
    budget = Budget(gate=0.4, width=0.6, hard=hard)
    gates = [[float(p >= 0.5) for p in row] for row in routing.probability.tolist()]
    values = gates if hard else routing.probability.tolist()
    mean = sum(map(sum, values)) / 18
    assert gate_loss(routing, budget).item() == pytest.approx((mean - 0.4) ** 2, rel=1e-4)
    q = routing.choice if hard else routing.width_probability
    total = sum(
        gates[row][block] * sum(q[row, block, j].item() * WIDTHS[j] for j in range(4))
        for row in range(6)
        for block in range(3)
    )
    expected = (total / sum(map(sum, gates)) - 0.6) ** 2
    assert width_loss(routing, budget).item() == pytest.approx(expected, rel=1e-4)


def test_soft_budget_is_satisfied_by_open_gates_and_the_hard_one_is_not():
    routing = routing_of(torch.full((4, 3), 0.01), torch.zeros(4, 3, 4))
    assert gate_loss(routing, Budget(0.5, 0.6, hard=False)).item() < 1e-4
    assert gate_loss(routing, Budget(0.5, 0.6, hard=True)).item() == pytest.approx(0.25)


def test_descending_the_budget_losses_reaches_the_budget():
    generator = torch.Generator().manual_seed(2)
    gates = (torch.rand(64, 9, generator=generator) + 1).requires_grad_()
    widths = (torch.randn(64, 9, 4, generator=generator) * 0.3 + torch.tensor([0.0, 0, 0, 2])).requires_grad_()
    optimizer = torch.optim.Adam([gates, widths], lr=0.02)
    for _ in range(400):
        losses = budget_losses(routing_of(gates, widths), torch.zeros(()), Budget.preset("flux"))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["gate_rate"].item() == pytest.approx(0.5, abs=0.05)
    assert losses["mean_width"].item() == pytest.approx(0.6, abs=0.05)


def test_no_running_block_means_no_width_loss():
    routing = routing_of(torch.full((2, 3), -5.0, requires_grad=True), torch.zeros(2, 3, 4, requires_grad=True))
    losses = budget_losses(routing, torch.zeros(()), Budget(0.5, 0.6))
    assert losses["loss_width"].item() == 0
    losses["loss"].backward()
    assert torch.isfinite(losses["mean_width"])


def test_logs_per_block():
    logits = torch.tensor([[3.0, -3.0, 3.0], [3.0, -3.0, -3.0]])
    widths = torch.zeros(2, 3, 4)
    widths[:, 0, 1] = 1
    widths[:, 2, 3] = 1
    losses = budget_losses(routing_of(logits, widths), torch.tensor(1.0), Budget(0.5, 0.6, weight=2.0))
    assert losses["block_gate_rate"].tolist() == [1.0, 0.0, 0.5]
    assert losses["block_width"].tolist() == [0.5, 0.0, 1.0]
    assert losses["block_gate_deviation"].tolist() == [0.0, 0.0, 0.5]
    assert losses["loss"].item() == pytest.approx(1 + 2 * (losses["loss_gate"] + losses["loss_width"]).item())


def test_budgets_are_checked_and_named():
    assert (PRESETS["flux"].gate, PRESETS["flux"].width) == (0.5, 0.6)
    with pytest.raises(ValueError, match="qwen-image-base"):
        Budget.preset("sdxl")
    with pytest.raises(ValueError, match=r"Budget\.gate is 50"):
        Budget(gate=50, width=0.6)
