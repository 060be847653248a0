"""Budget losses of elastic training (equations 9, 14, 15) and what is logged beside them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from edit_compile.elastic.straight_through import Routing, expected_width


@dataclass(frozen=True)
class Budget:
    """Shares of compute to train for.

    `gate` is rho_g, the share of blocks to run; `width` is rho_w, the mean MLP width of the blocks that run; `weight`
    is lambda. The paper's losses bound the mean of the soft p and q, which p = 0.51 everywhere satisfies with every
    gate open; `hard` bounds the decisions taken instead, with the gradient of the soft ones.
    """

    gate: float
    width: float
    weight: float = 1.0
    hard: bool = True

    def __post_init__(self) -> None:
        for name in ("gate", "width"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Budget.{name} is {getattr(self, name)}: a share of compute lies in (0, 1]")

    @staticmethod
    def preset(name: str) -> Budget:
        """The paper's budgets: qwen-image-base, qwen-image-turbo, flux, hunyuan3d.

        Raises:
            ValueError: no preset has this name.
        """
        if name not in PRESETS:
            raise ValueError(f"no budget preset {name!r}: choose one of {', '.join(sorted(PRESETS))}")
        return PRESETS[name]


PRESETS = {
    "qwen-image-base": Budget(gate=0.60, width=0.65),
    "qwen-image-turbo": Budget(gate=0.50, width=0.60),
    "flux": Budget(gate=0.50, width=0.60),
    "hunyuan3d": Budget(gate=0.45, width=0.50),
}


def gate_loss(routing: Routing, budget: Budget) -> Tensor:
    """(mean of p over rows and blocks - rho_g)^2 (equation 9), scalar."""
    value = routing.gate if budget.hard else routing.probability
    return (value.mean() - budget.gate) ** 2


def width_loss(routing: Routing, budget: Budget) -> Tensor:
    """(mean of sum_j q_j S_j over the rows and blocks that run - rho_w)^2 (equations 14-15); 0 where none runs."""
    active = routing.gate.detach()
    width = expected_width(routing.choice if budget.hard else routing.width_probability, routing.widths)
    mean = (active * width).sum() / active.sum().clamp(min=1)
    return (mean - budget.width) ** 2 * (active.sum() > 0)


def budget_losses(routing: Routing, flow: Tensor, budget: Budget) -> dict[str, Tensor]:
    """L = L_flow + lambda (L_gate + L_width), its parts, and logs: what `Task.loss` returns.

    Scalars "gate_rate" and "mean_width" (of the blocks that run); vectors (n,) "block_gate_rate", "block_width" and
    "block_gate_deviation": the standard deviation of the decision over the rows, 0 where it is always the same.
    """
    by_gate, by_width = gate_loss(routing, budget), width_loss(routing, budget)
    gates, widths = routing.gate.detach(), routing.width.detach()
    running = gates.sum(0).clamp(min=1)
    return {
        "loss": flow + budget.weight * (by_gate + by_width),
        "loss_flow": flow.detach(),
        "loss_gate": by_gate.detach(),
        "loss_width": by_width.detach(),
        "gate_rate": gates.mean(),
        "mean_width": (gates * widths).sum() / gates.sum().clamp(min=1),
        "block_gate_rate": gates.mean(0),
        "block_width": (gates * widths).sum(0) / running,
        "block_gate_deviation": gates.std(0, correction=0),
    }
