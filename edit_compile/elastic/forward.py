"""One forward of an elastic model: what its hooks share, and what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit_compile.elastic.layout import Layout
from edit_compile.elastic.rule import Rule
from edit_compile.elastic.straight_through import Routing
from passes.graphs.batch_layout import Packing


@dataclass(frozen=True)
class Decision:
    """What one block does: gate (B,) and width choice (B, |S|), hard in value; `soft` tells whether with a gradient."""

    gate: Tensor
    choice: Tensor
    soft: bool

    def apart(self) -> Decision:
        """The values without their graph."""
        return Decision(self.gate.detach(), self.choice.detach(), self.soft)

    def as_leaves(self) -> Decision:
        """The values, which need a gradient if they had one, so that as much is saved for a backward pass."""
        gate, choice = (value.detach().requires_grad_(self.soft) for value in (self.gate, self.choice))
        return Decision(gate, choice, self.soft)


class Forward:
    """What the hooks of one forward of the elastic model `owner` share.

    One that is computed `again` takes the decisions that were `taken`, even where a kernel that adds in another order
    would now find a logit on the other side of a threshold: only their gradients are made anew.
    """

    def __init__(
        self,
        owner: object,
        kwargs: Mapping[str, Any],
        layout: Layout,
        hard: bool,
        rule: Rule,
        taken: Mapping[int, Decision] | None = None,
    ) -> None:
        self.owner, self.hard, self.rule = owner, hard, rule
        self.timestep = kwargs[layout.timestep]
        self._kwargs, self._layout, self._recorded = kwargs, layout, taken
        self._soft: dict[int, tuple[Tensor, Tensor]] = {}
        self._decided: dict[int, Decision] = {}
        self._taken: dict[int, Decision] = {}

    def again(self) -> Forward:
        """The same forward, parts of which will run again."""
        taken = self._taken if self._recorded is None else self._recorded
        return Forward(self.owner, self._kwargs, self._layout, self.hard, self.rule, taken)

    def per_sample(self, value: Tensor, packing: Packing) -> Tensor:
        """The rows of `value` with samples as dimension 0."""
        samples = 0
        if packing.folded:
            assert self._layout.samples is not None
            samples = self._layout.samples.count(self._kwargs)
        return packing.per_sample(value, samples)[0].movedim(packing.dim, 0)

    def decide(self, block: int, gate_logit: Tensor, width_logits: Tensor) -> None:
        """Note what block number `block` does, by its logits (B,) and (B, |S|)."""
        before = None if self._recorded is None else self._recorded[block]
        p, g = self.rule.gate(block, gate_logit, None if before is None else before.gate)
        q, choice = self.rule.width(block, width_logits, None if before is None else before.choice)
        self._soft[block], self._decided[block] = (p, q), Decision(g, choice, g.requires_grad)
        if before is None:
            self._taken[block] = self._decided[block].apart()

    def decision(self, block: int) -> Decision:
        """What block number `block` does.

        Where only a region inside the block is computed again, its router is not: that region's graph is thrown away,
        and the gradient goes the way of the first one.
        """
        if self._recorded is not None and block not in self._decided:
            return self._recorded[block].as_leaves()
        return self._decided[block]

    def routing(self, widths: tuple[float, ...]) -> Routing:
        """All its decisions."""
        p, q = (torch.stack(values, 1) for values in zip(*self._soft.values(), strict=True))
        decided = self._decided.values()
        g, choice = torch.stack([each.gate for each in decided], 1), torch.stack([each.choice for each in decided], 1)
        return Routing(p, g, q, choice, widths)

    def clear(self) -> None:
        """Forget all that holds the graph, which may hold this; what was decided stays."""
        self._soft, self._decided = {}, {}
