"""Hard decisions with soft gradients: the gate, the width choice and the mask of an MLP's hidden channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.mlp.weights import site_rows


@dataclass(frozen=True)
class Routing:
    """What the routers of one forward decided, for B rows and n blocks.

    `probability` p (B, n) and `width_probability` q (B, n, |S|) are soft. `gate` g (B, n) and `choice` (B, n, |S|) are
    hard in value (0 or 1, and one-hot), soft in gradient. `widths` is S.
    """

    probability: Tensor
    gate: Tensor
    width_probability: Tensor
    choice: Tensor
    widths: tuple[float, ...]

    @property
    def width(self) -> Tensor:
        """Chosen widths s (B, n), with the gradient of the soft expectation sum_j q_j S_j."""
        return expected_width(self.choice, self.widths)


def expected_width(choice: Tensor, widths: Sequence[float]) -> Tensor:
    """sum_j q_j S_j over the last dimension of `choice` (..., |S|)."""
    return choice @ torch.tensor(widths, dtype=choice.dtype, device=choice.device)


def gate(logit: Tensor, threshold: float = 0.5, hard: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probability p = sigmoid(logit) and straight-through gate 1[p >= threshold] + p - stop_grad(p) (equation 7).

    `hard` (B,) is the gate's value where that was decided before.
    """
    probability = torch.sigmoid(logit)
    if hard is None:
        hard = (probability >= threshold).to(probability.dtype)
    return probability, hard.detach() + (probability - probability.detach())


def choose_width(logits: Tensor, hard: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities q (B, |S|), and the one-hot of the most likely width with their gradient (equations 10-12).

    `hard` (B, |S|) is that one-hot where it was decided before.
    """
    soft = torch.softmax(logits, dim=-1)
    if hard is None:
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return soft, hard.detach() + (soft - soft.detach())


def channel_mask(choice: Tensor, widths: Sequence[float], start: int, hidden: int, total: int) -> Tensor:
    """Mask (B, total) of a down-projection's input channels (equation 13).

    Channels start .. start + hidden are those of the MLP: the first s * hidden stay, the others become zero. Channels
    outside (an attention output joined to them) are left alone. `choice` is (B, |S|), one-hot or soft.
    """
    prefixes = torch.ones(len(widths), total, dtype=choice.dtype, device=choice.device)
    for row, width in enumerate(widths):
        prefixes[row, start + site_rows(hidden, width) : start + hidden] = 0
    return choice @ prefixes
