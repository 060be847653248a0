"""How one forward of an elastic model decides."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from edit_compile.elastic.straight_through import choose_width, gate

THRESHOLD = 0.5

Rows = Callable[[int, Tensor], Tensor]
"""Gives a value for each row of the batch (B,) in a shape that multiplies the block's state of that number."""


class Rule:
    """Per row: run the block at the likeliest width, or skip it (equations 7 and 10-12).

    Of what is computed again for a backward pass the decisions that were `taken` are given: only gradients are new.
    """

    keeps = False
    """Whether it is told what blocks add, and says what is added in the place of that."""

    def gate(self, block: int, logit: Tensor, taken: Tensor | None) -> tuple[Tensor, Tensor]:
        """p and g (B,) of the block, from its gate logit (B,)."""
        return gate(logit, THRESHOLD, taken)

    def width(self, block: int, logits: Tensor, taken: Tensor | None) -> tuple[Tensor, Tensor]:
        """q and the choice (B, |S|), from the width logits (B, |S|)."""
        return choose_width(logits, taken)

    def residuals(self, block: int, added: list[Tensor], rows: Rows) -> list[Tensor]:
        """What is added to the block's states where g is 0; `added` is what the block would have added to them."""
        raise NotImplementedError
