"""A router evaluated for inference: no tensor of the tokens' size beyond the normalised tokens.

The modulation is folded into W, streams are projected one by one instead of being joined, and both
heads are one product after the token mean. Equal to `runtime.routing.router.Router.forward` up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.base.errors import EditError
from runtime.bundle.spec import RouterConfig
from runtime.routing.router import activated, read_streams, rows_of_steps, sinusoid


class FoldedRouter:
    """One block's router over its parameters (names as in `runtime.routing.router.Router`)."""

    def __init__(self, config: RouterConfig, parameters: Mapping[str, Tensor]) -> None:
        self._eps = config.eps
        self._activation = getattr(F, config.activation)
        self._time_activation = config.time_activation
        self._weight = parameters["hidden.weight"]
        self._bias = parameters["hidden.bias"]
        self._heads = torch.cat([parameters["gate.weight"], parameters["width.weight"]])
        self._heads_bias = torch.cat([parameters["gate.bias"], parameters["width.bias"]])
        chain = ("modulation.0", "modulation.1") if "modulation.0.weight" in parameters else ("modulation",)
        self._modulation = [
            (parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))
            for name in chain
            if f"{name}.weight" in parameters
        ]

    def __call__(self, states: Sequence[Tensor], time: Tensor) -> Tensor:
        """Logits (B, 1 + |S|) of the gate and the widths.

        `states` are all of the block's (`read_streams` are read), `time` is (B, E) or (1, E); the result has the
        router's dtype.
        """
        weight, bias = self._modulated(time)
        hidden = self._pool(read_streams(states), weight, bias)
        return F.linear(hidden, self._heads, self._heads_bias)

    def _modulated(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(1 + gamma) W (B, H_r, D) and delta W + b (B, H_r), of equation 4 put into 5."""
        if not self._modulation:
            return self._weight[None], self._bias[None]
        modulation = activated(time.to(self._weight.dtype), self._time_activation)
        for weight, bias in self._modulation:
            modulation = F.linear(modulation, weight, bias)
        gamma, delta = modulation.chunk(2, dim=1)
        return torch.addcmul(self._weight, self._weight, gamma[:, None]), F.linear(delta, self._weight, self._bias)

    def _pool(self, streams: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        """Token mean of h (B, H_r) over all streams (B, L_i, D), summed in float32: half precision overflows."""
        total: Tensor | None = None
        for stream in streams:
            normed = F.layer_norm(stream, stream.shape[-1:], eps=self._eps).to(weight.dtype)
            part = self._activation(_project(normed, weight, bias)).sum(1, dtype=torch.float32)
            total = part if total is None else total + part
        assert total is not None
        return (total / sum(stream.shape[1] for stream in streams)).to(weight.dtype)


def _project(stream: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b for tokens (B, L, D), with W (B or 1, H_r, D) and b (B or 1, H_r) of each row's own."""
    if weight.shape[0] == 1:
        return F.linear(stream, weight[0], bias[0])
    return torch.baddbmm(bias[:, None], stream, weight.transpose(1, 2))


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
    """p from the logits of one row, the gate's first (equation 10); EditError, naming the block, for one not finite."""
    if not all(map(math.isfinite, logits)):
        raise EditError(
            f"the router of block {block} gives {list(logits)}: its inputs or weights overflow {dtype}; "
            "check the latents, or compile in bfloat16 or float32"
        )
    return 1.0 / (1.0 + math.exp(-logits[0])) if logits[0] > -700.0 else 0.0
