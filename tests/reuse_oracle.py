"""Reuse by schedule and by change, row by row, beside Algorithm 1: what `ReusePolicy` has to agree with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracle import Oracle


@dataclass
class Held:
    """The residuals of a row of a block, each with its timestep, and how often the last one was reused."""

    computed: list[tuple[float, list[Tensor]]]
    watched: list[Tensor] | None
    reused: int = 0


@dataclass
class ReuseOracle(Oracle):
    """Reuses more: up to `most` times in a row after `warmup` steps, of `order`, while little changes."""

    most: int = 0
    warmup: int = 1
    order: int = 0
    change: float | None = None
    watches: str | None = None
    own: dict[tuple[str, int, int], Held] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)
    """How near changes came to `change`."""

    def _row(self, context: str, step: int, row: int, latent: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        hidden = latent @ self.weights["glue.into"]
        time = torch.sin(timestep * self.weights["glue.timing"])
        first: list[Tensor] | None = None
        for block, kind in enumerate(self.kinds):
            states = [hidden, text] if kind == "double" else [hidden]
            p, width = self._route(block, states, time if kind == "double" else self._sinusoid(timestep))
            key, now = (context, block, row), states if self.watches == "input" else first
            held = self.own.get(key)
            if p < self.threshold:
                done, width = "skip", 0.0
            elif held is not None and (self._borderline(p, held) or self._unchanged(step, held, now)):
                done, width = "reuse", 0.0
                deltas = self._residual(held, float(timestep))
                held.reused += 1
                states = [x + delta for x, delta in zip(states, deltas, strict=True)]
            else:
                done = "compute"
                after = self._block(block, kind, states, time, width)
                deltas = [y - x for x, y in zip(states, after, strict=True)]
                if block == 0 and self.watches == "first block":
                    first = deltas
                before = [] if held is None else [one for one in held.computed if one[0] != float(timestep)]
                self.own[key] = Held([*before, (float(timestep), deltas)][-2:], now)
                states = after
            self.log.append((context, step, block, row, done, width))
            self.gates.append(p)
            hidden, text = states[0], states[1] if kind == "double" else text
        return hidden @ self.weights["glue.out"]

    def _borderline(self, p: float, held: Held) -> bool:
        return p <= self.threshold + self.margin and held.reused < self.max_reuse

    def _unchanged(self, step: int, held: Held, now: Sequence[Tensor] | None) -> bool:
        if step < self.warmup or held.reused >= self.most:
            return False
        if self.change is None:
            return True
        if now is None or held.watched is None:
            return False
        pairs = list(zip(now, held.watched, strict=True))
        moved = sum(float((a - b).abs().sum()) for a, b in pairs) / sum(float(b.abs().sum()) for _, b in pairs)
        self.margins.append(abs(moved - self.change))
        return moved <= self.change

    def _residual(self, held: Held, now: float) -> list[Tensor]:
        (then, last), *earlier = reversed(held.computed)
        if not (self.order and earlier):
            return last
        ((before, old),) = earlier
        ahead = (now - then) / (then - before)
        return [a + ahead * (a - b) for a, b in zip(last, old, strict=True)]
