"""Algorithm 1 of the paper row by row, in plain Python: what the runtime has to agree with.

Written from the equations (DESIGN section 1) for the hand-made programs of tests/programs.py.
Shares no code with runtime/: a width masks the hidden channels (13) instead of slicing weights,
each row is run alone, and the router is spelled out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Decision = tuple[str, int, int, int, str, float]
"""(context, step, block, row, what was done, width)."""


@dataclass
class Oracle:
    """Runs the program's model; `bank` is C, keyed by (context, block, row)."""

    kinds: Sequence[str]
    weights: Mapping[str, Tensor]
    routers: Mapping[str, Tensor]
    widths: Sequence[float]
    threshold: float
    margin: float
    max_reuse: int
    bank: dict[tuple[str, int, int], tuple[list[Tensor], int]] = field(default_factory=dict)
    log: list[Decision] = field(default_factory=list)
    gates: list[float] = field(default_factory=list)

    def __call__(self, context: str, step: int, hidden: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """The model's output for a batch, one row after the other."""
        rows = [self._row(context, step, row, hidden[row], text[row], timestep[row]) for row in range(len(hidden))]
        return torch.stack(rows)

    def _row(self, context: str, step: int, row: int, latent: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        hidden = latent @ self.weights["glue.into"]
        time = torch.sin(timestep * self.weights["glue.timing"])
        for block, kind in enumerate(self.kinds):
            states = [hidden, text] if kind == "double" else [hidden]
            embedding = time if kind == "double" else self._sinusoid(timestep)
            p, width = self._route(block, states, embedding)
            key = (context, block, row)
            stored = self.bank.get(key)
            if p < self.threshold:
                done, width = "skip", 0.0
            elif p <= self.threshold + self.margin and stored is not None and stored[1] < self.max_reuse:
                done, width = "reuse", 0.0
                deltas, k = stored
                states = [x + delta for x, delta in zip(states, deltas, strict=True)]
                self.bank[key] = (deltas, k + 1)
            else:
                done = "compute"
                after = self._block(block, kind, states, time, width)
                self.bank[key] = ([y - x for x, y in zip(states, after, strict=True)], 0)
                states = after
            self.log.append((context, step, block, row, done, width))
            self.gates.append(p)
            hidden = states[0]
            text = states[1] if kind == "double" else text
        return hidden @ self.weights["glue.out"]

    def _route(self, block: int, states: Sequence[Tensor], time: Tensor) -> tuple[float, float]:
        """p and s of equations 4-6, 10-12."""
        own = {name.split(".", 1)[1]: t for name, t in self.routers.items() if name.split(".", 1)[0] == str(block)}
        x = torch.cat(list(states))
        normal = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-6)
        gamma, delta = (own["modulation.weight"] @ time + own["modulation.bias"]).split(x.shape[1])
        h = (1 + gamma) * normal + delta
        h = h @ own["hidden.weight"].t() + own["hidden.bias"]
        h = h / (1 + torch.exp(-h))
        logit = (h @ own["gate.weight"].t() + own["gate.bias"]).mean()
        choices = (h @ own["width.weight"].t() + own["width.bias"]).mean(0)
        best = max(range(len(self.widths)), key=lambda j: float(choices[j]))
        return 1 / (1 + math.exp(-float(logit))), self.widths[best]

    def _block(self, block: int, kind: str, states: Sequence[Tensor], time: Tensor, width: float) -> list[Tensor]:
        own = {name.rsplit(".", 1)[1]: t for name, t in self.weights.items() if name.startswith(f"blocks.{block}.")}
        mask = (torch.arange(len(own["up"])) < round(width * len(own["up"]))).float()
        hidden = states[0]
        if kind == "single":
            return [hidden + (torch.relu(hidden @ own["up"].t()) * mask) @ own["down"]]
        text = states[1]
        table = torch.arange(hidden.numel(), dtype=torch.float32).reshape(hidden.shape) * 0.01
        z = (hidden + table) @ own["up"].t() + own["bias"]
        active = z * 0.5 * (1 + torch.erf(z / math.sqrt(2))) * mask
        return [hidden + active @ own["down"] + time @ own["mix"] + text.mean(0), text + hidden.mean(0) * 0.5]

    @staticmethod
    def _sinusoid(timestep: Tensor, dim: int = 6) -> Tensor:
        angles = [float(timestep) * 10_000 ** (-i / (dim // 2)) for i in range(dim // 2)]
        return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
