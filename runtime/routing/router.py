"""The router: from a block's token streams and time embedding to one gate logit and |S| width logits per row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.bundle.spec import RouterConfig

OPEN_LOGIT = 2.0  # sigmoid(2) = 0.88: open, yet not so saturated that the gate could not learn to close


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) float32 of timesteps (B,); `dim` must be even.

    Wavelengths run from 2 pi to 20,000 pi, cosines first, as in DDPM.
    """
    if dim % 2:
        raise ValueError(f"RouterConfig.time_dim is {dim}: a sinusoidal embedding needs an even width")
    half = torch.arange(dim // 2, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10_000) * half / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rows_of_steps(timestep: Tensor, rows: int) -> Tensor:
    """One timestep per row (rows,), or one for all (1,); the mean where a row, or the batch, has several.

    Several are those of frames (rows, frames), or the levels of noise of a batch whose rows share them.
    """
    steps = timestep.float()
    per_row = timestep.ndim > 0 and timestep.shape[0] == rows
    return steps.reshape(rows, -1).mean(1) if per_row else steps.mean().reshape(1)


def read_streams(states: Sequence[Tensor]) -> list[Tensor]:
    """The streams that a router reads, as tokens (B, L_i, D): the states as wide as the first, in order.

    States are (B, ..., D). Those of another width (an audio stream beside a wider video) have no part in the decision,
    but share it.
    """
    width = states[0].shape[-1]
    return [state.flatten(1, -2) for state in states if state.shape[-1] == width]


def activated(time: Tensor, function: str | None) -> Tensor:
    """The time embedding after `function` of torch.nn.functional, unchanged where that is None."""
    return time if function is None else getattr(F, function)(time)


class Router(nn.Module):
    """One block's router (equations 4-6).

    x~ = (1 + gamma(t)) LN(x) + delta(t);  h = act(x~ W);  gate and width logits are linear in the token mean of h
    (equal to the paper's mean of per-token logits, since heads and mean commute). gamma and delta are linear in the
    time embedding, after the config's time_activation where it has one.

    Args:
        config: the form, shared by all routers of a model.
        dim: D, channels of the first stream's tokens.
        time_dim: E, channels of the time embedding.
    """

    def __init__(self, config: RouterConfig, dim: int, time_dim: int) -> None:
        super().__init__()
        if config.modulation not in ("full", "low_rank", "none"):
            raise ValueError(f"RouterConfig.modulation is {config.modulation!r}: use 'full', 'low_rank' or 'none'")
        if not callable(getattr(F, config.activation, None)):
            raise ValueError(f"RouterConfig.activation is {config.activation!r}: not in torch.nn.functional")
        if config.time_activation is not None and not callable(getattr(F, config.time_activation, None)):
            raise ValueError(f"RouterConfig.time_activation is {config.time_activation!r}: not in torch.nn.functional")
        self.config, self.dim, self.time_dim = config, dim, time_dim
        self.modulation: nn.Module | None = None
        if config.modulation == "full":
            self.modulation = nn.Linear(time_dim, 2 * dim)
        elif config.modulation == "low_rank":
            self.modulation = nn.Sequential(
                nn.Linear(time_dim, config.rank, bias=False), nn.Linear(config.rank, 2 * dim)
            )
        self.hidden = nn.Linear(dim, config.hidden)
        self.gate = nn.Linear(config.hidden, 1)
        self.width = nn.Linear(config.hidden, len(config.widths))
        self.open_fully()

    @torch.no_grad()
    def open_fully(self) -> None:
        """Full-capacity initialisation: whatever the input, the gate is open and the full width chosen."""
        for head in (self.gate, self.width):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.gate.bias.fill_(OPEN_LOGIT)
        self.width.bias[-1] = OPEN_LOGIT

    def forward(self, states: Sequence[Tensor], time: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of one call.

        Args:
            states: the block's token streams (B, ..., D), of which `read_streams` are read, joined along tokens.
            time: time embedding (B, E), or (1, E) shared by all rows.

        Returns:
            gate logits (B,) and width logits (B, |S|), in the states' dtype.
        """
        streams = read_streams(states)
        joined = streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)
        normed = F.layer_norm(joined, (self.dim,), eps=self.config.eps)
        activation = getattr(F, self.config.activation)
        hidden = activation(self._project(normed, time)).mean(dim=1)
        return self.gate(hidden)[:, 0], self.width(hidden)

    def _project(self, normed: Tensor, time: Tensor) -> Tensor:
        """x~ W + b, (B, L, H_r)."""
        if self.modulation is None:
            return self.hidden(normed)
        embedding = activated(time.to(normed.dtype), self.config.time_activation)
        gamma, delta = self.modulation(embedding).chunk(2, dim=1)
        if normed.shape[1] <= self.config.hidden:
            return self.hidden((1 + gamma)[:, None] * normed + delta[:, None])
        # The same algebra with the modulation folded into W: B x H_r x D numbers instead of B x L x D.
        weight = self.hidden.weight * (1 + gamma)[:, None]
        bias = self.hidden(delta)[:, None].expand(len(normed), -1, -1)
        return torch.baddbmm(bias, normed, weight.expand(len(normed), -1, -1).transpose(1, 2))
