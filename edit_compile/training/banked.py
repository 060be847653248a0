"""Algorithm 1 in training: its decisions with the gradients of straight-through ones, and its bank of residuals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_compile.elastic.rule import Rows, Rule
from edit_compile.elastic.straight_through import choose_width
from runtime.routing.policy import EMPTY, RoutingPolicy


@dataclass(frozen=True)
class Held:
    """A block's residuals of a batch: one tensor per state, without gradient, and how often each row (B,) reused it."""

    residuals: list[Tensor]
    reused: Tensor


class BankedRule(Rule):
    """Algorithm 1 in one forward, in step `step` of a generation (from 0), with the bank that the last one left.

    Decisions are those of `policy`, in value. The gradient of a gate is that of p, times the difference between the
    block's output when it is computed and when it is not: then its residual is reused where that may be, else nothing.

    With `noise` s, logits are drawn before they decide: gate logits + s * logistic, width logits + s * Gumbel noise. At
    1 a gate is open with probability p, so that training moves p away from one half wherever the difference matters.
    """

    keeps = True

    def __init__(self, policy: RoutingPolicy, step: int, bank: Mapping[int, Held], noise: float = 0.0) -> None:
        self.policy, self.step, self.noise = policy, step, noise
        self.before, self.after = bank, dict(bank)
        self.reusing: dict[int, Tensor] = {}
        self._running: dict[int, Tensor] = {}
        self._instead: dict[int, Tensor] = {}
        self._drawn: dict[tuple[str, int], Tensor] = {}

    def gate(self, block: int, logit: Tensor, taken: Tensor | None) -> tuple[Tensor, Tensor]:
        """p (B,), and g (B,): 1 where the block is computed."""
        probability = torch.sigmoid(logit + self._noise("gate", block, logit) if self.noise else logit)
        if taken is None:
            self._decide(block, probability.detach())
        hard = self._running[block].to(probability.dtype)
        return probability, hard + (probability - probability.detach())

    def _decide(self, block: int, probability: Tensor) -> None:
        """Algorithm 1 for one block, row by row."""
        held = self._held(block, probability)
        limit = self.policy.max_reuse if self.step >= self.policy.warmup_steps else 0
        skips = probability < self.policy.threshold
        may = ~skips & (held > EMPTY) & (held < limit)
        self.reusing[block] = may & (probability <= self.policy.threshold + self.policy.margin)
        self._running[block] = ~skips & ~self.reusing[block]
        self._instead[block] = may if self.policy.margin else self.reusing[block]

    def width(self, block: int, logits: Tensor, taken: Tensor | None) -> tuple[Tensor, Tensor]:
        """q and the choice (B, |S|)."""
        return choose_width(logits + self._noise("width", block, logits) if self.noise else logits, taken)

    def residuals(self, block: int, added: list[Tensor], rows: Rows) -> list[Tensor]:
        """The bank's where a row may reuse, else zeros; and the bank is brought up to date."""
        runs, before = self._running[block], self.before.get(block)
        if before is None:
            self.after[block] = Held(added, torch.where(runs, 0, EMPTY))
            return [torch.zeros_like(tensor) for tensor in added]
        pairs = list(enumerate(zip(added, before.residuals, strict=True)))
        reused = torch.where(runs, 0, before.reused + self.reusing[block].int())
        self.after[block] = Held([torch.where(rows(i, runs), new, old) for i, (new, old) in pairs], reused)
        return [torch.where(rows(i, self._instead[block]), old, 0) for i, (_, old) in pairs]

    def _held(self, block: int, logit: Tensor) -> Tensor:
        """How often each row reused its residual; EMPTY where it has none."""
        if block not in self.before:
            return torch.full(logit.shape, EMPTY, device=logit.device)
        return self.before[block].reused

    def _noise(self, kind: str, block: int, like: Tensor) -> Tensor:
        """Gumbel noise (widths), or the difference of two (gates): of a forward the first that was drawn.

        It is drawn again where a block is computed again, for random numbers that come after it, as of dropout.
        """
        drawn = _gumbel(like) if kind == "width" else _gumbel(like) - _gumbel(like)
        return self._drawn.setdefault((kind, block), self.noise * drawn)


def _gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()
