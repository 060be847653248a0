"""The routers of a program, evaluated for inference: both heads are one product after the token mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.base.errors import NotFiniteError
from runtime.bundle.spec import RouterConfig
from runtime.routing.router import hidden_mean, rows_of_steps, sinusoid


class FoldedRouter:
    """One block's router over its parameters (names as in `runtime.routing.router.Router`)."""

    def __init__(self, config: RouterConfig, parameters: Mapping[str, Tensor]) -> None:
        self._config, self._parameters = config, parameters
        self._heads = torch.cat([parameters["gate.weight"], parameters["width.weight"]])
        self._heads_bias = torch.cat([parameters["gate.bias"], parameters["width.bias"]])

    def __call__(self, states: Sequence[Tensor], time: Tensor) -> Tensor:
        """Logits (B, 1 + |S|) of the gate and the widths, in the router's dtype (see `hidden_mean`)."""
        hidden = hidden_mean(self._config, self._parameters, states, time)
        return F.linear(hidden, self._heads, self._heads_bias)


class Routers:
    """All routers of a program, by block; blocks without a time input share one sinusoidal embedding."""

    def __init__(self, config: RouterConfig, blocks: int, parameters: Mapping[str, Tensor]) -> None:
        self.config = config
        self.dtype = next(iter(parameters.values())).dtype
        grouped: list[dict[str, Tensor]] = [{} for _ in range(blocks)]
        for key, tensor in parameters.items():
            index, name = key.split(".", 1)
            grouped[int(index)][name] = tensor
        self._routers = [FoldedRouter(config, own) for own in grouped]

    def embed(self, timestep: Tensor, rows: int) -> Tensor:
        """Sinusoidal embedding (rows, time_dim) or (1, time_dim) of the timestep of a batch of `rows`."""
        return sinusoid(rows_of_steps(timestep, rows), self.config.time_dim)

    def __call__(self, block: int, states: Sequence[Tensor], time: Tensor) -> Tensor:
        """Logits (B, 1 + |S|) of `block`'s router."""
        return self._routers[block](states, time)


def gate_of(logits: Sequence[float], block: str, dtype: torch.dtype) -> float:
    """p from the logits of one row, the gate's first (equation 10); NotFiniteError, naming the block, for another."""
    if not all(map(math.isfinite, logits)):
        raise NotFiniteError(
            f"the router of block {block} gives {list(logits)}: its inputs or weights overflow {dtype}; "
            "check the latents, or compile in bfloat16 or float32"
        )
    return 1.0 / (1.0 + math.exp(-logits[0])) if logits[0] > -700.0 else 0.0
