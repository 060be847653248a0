"""Algorithm 1 around the eager FLUX model, one row at a time: what a compiled FLUX has to agree with.

Written from the paper's pseudo-code and equations; shares no code with runtime/ or passes/. Widths mask the hidden
channels (equation 13) instead of slicing weights, and the router is spelled out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


class FluxOracle:
    """Calls the model row by row; `bank` is C of Algorithm 1, keyed by (context, row, block)."""

    def __init__(
        self,
        model: nn.Module,
        routers: Mapping[str, Tensor],
        widths: Sequence[float],
        threshold: float,
        margin: float,
        max_reuse: int,
    ) -> None:
        self.model, self.routers, self.widths = model, routers, widths
        self.threshold, self.margin, self.max_reuse = threshold, margin, max_reuse
        self.bank: dict[tuple[str, int, int], tuple[list[Tensor], int]] = {}
        self.log: list[tuple[str, int, int, str, float]] = []

    @torch.no_grad()
    def __call__(self, context: str, inputs: Mapping[str, Any]) -> Tensor:
        rows = len(inputs["hidden_states"])
        shared = ("img_ids", "txt_ids")
        outputs = []
        for row in range(rows):
            own = {name: value if name in shared else value[row : row + 1] for name, value in inputs.items()}
            outputs.append(self._row(context, row, own))
        return torch.cat(outputs)

    def _row(self, context: str, row: int, inputs: Mapping[str, Any]) -> Tensor:
        blocks = [*self.model.transformer_blocks, *self.model.single_transformer_blocks]
        originals = [block.forward for block in blocks]
        try:
            for index, block in enumerate(blocks):
                block.forward = self._guarded(context, row, index, block, originals[index])
            return self.model(**inputs, return_dict=False)[0]
        finally:
            for block in blocks:
                del block.forward

    def _guarded(self, context: str, row: int, index: int, block: nn.Module, forward: Any) -> Any:
        def answer(**kwargs: Any) -> tuple[Tensor, Tensor]:
            states = [kwargs["encoder_hidden_states"], kwargs["hidden_states"]]
            p, width = self._route(index, states, kwargs["temb"])
            stored = self.bank.get((context, row, index))
            if p < self.threshold:
                self.log.append((context, row, index, "skip", 0.0))
                return states[0], states[1]
            if p <= self.threshold + self.margin and stored is not None and stored[1] < self.max_reuse:
                deltas, k = stored
                self.bank[context, row, index] = (deltas, k + 1)
                self.log.append((context, row, index, "reuse", 0.0))
                return states[0] + deltas[0], states[1] + deltas[1]
            with _masked(block, width):
                after = forward(**kwargs)
            self.bank[context, row, index] = ([y - x for x, y in zip(states, after, strict=True)], 0)
            self.log.append((context, row, index, "compute", width))
            return after

        return answer

    def _route(self, index: int, states: Sequence[Tensor], time: Tensor) -> tuple[float, float]:
        own = {key.partition(".")[2]: value for key, value in self.routers.items() if key.split(".")[0] == str(index)}
        x = torch.cat(list(states), dim=1)[0]
        normal = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-6)
        gamma, delta = (own["modulation.weight"] @ time[0] + own["modulation.bias"]).split(x.shape[1])
        hidden = ((1 + gamma) * normal + delta) @ own["hidden.weight"].t() + own["hidden.bias"]
        hidden = hidden / (1 + torch.exp(-hidden))
        logit = float((hidden @ own["gate.weight"].t() + own["gate.bias"]).mean())
        choices = (hidden @ own["width.weight"].t() + own["width.bias"]).mean(0)
        return 1 / (1 + math.exp(-logit)), self.widths[int(choices.argmax())]


def _masked(block: nn.Module, width: float) -> ExitStack:
    """FLUX's down-projections by name: the attention's channels come first in a single-stream block's."""
    stack = ExitStack()
    if hasattr(block, "proj_mlp"):
        hidden = block.proj_mlp.out_features
        downs = [(block.proj_out, block.proj_out.in_features - hidden, hidden)]
    else:
        downs = [(ff.net[2], 0, ff.net[2].in_features) for ff in (block.ff, block.ff_context)]
    for down, start, hidden in downs:
        mask = torch.ones(down.in_features)
        mask[start + round(width * hidden) : start + hidden] = 0
        handle = down.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
        stack.callback(handle.remove)
    return stack
