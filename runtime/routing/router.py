"""The router: from a block's token streams and time embedding to one gate logit and |S| width logits per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.bundle.spec import RouterConfig

FEW = 1 << 17
"""Numbers of all streams that are joined before they are projected: copying so many takes less than the calls saved."""
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


def hidden_mean(
    config: RouterConfig, parameters: Mapping[str, Tensor], states: Sequence[Tensor], time: Tensor
) -> Tensor:
    """Token mean of h (B, H_r), equations 4 and 5, in the dtype of the router's `parameters` (named as in `Router`).

    `states` are all of the block's (B, ..., D), of which `read_streams` are read, every `token_stride`-th token; `time`
    is (B, E) or (1, E). What is smaller is modulated, the tokens or W: x~ W = ((1 + gamma) LN(x) + delta) W =
    LN(x) (1 + gamma) W + delta W. Streams of more than `FEW` numbers are projected one by one instead of being joined.
    The mean is summed in float32: half precision overflows.
    """
    streams = [stream[:, :: config.token_stride] for stream in read_streams(states)]
    count = sum(stream.shape[1] for stream in streams)
    if len(streams) > 1 and sum(stream.numel() for stream in streams) <= FEW:
        streams = [torch.cat(streams, 1)]
    project = _projection(config, parameters, time, fold=count >= config.hidden)
    activation, dtype = getattr(F, config.activation), parameters["hidden.weight"].dtype
    total: Tensor | None = None
    for stream in streams:
        normed = F.layer_norm(stream, stream.shape[-1:], eps=config.eps).to(dtype)
        part = activation(project(normed)).sum(1, dtype=torch.float32)
        total = part if total is None else total + part
    assert total is not None
    return (total / count).to(dtype)


def _projection(
    config: RouterConfig, parameters: Mapping[str, Tensor], time: Tensor, fold: bool
) -> Callable[[Tensor], Tensor]:
    """x~ W + b (B, L, H_r) of normalised tokens (B, L, D), equations 4 and 5; with `fold`, W is modulated for them."""
    weight, bias = parameters["hidden.weight"], parameters["hidden.bias"]
    if config.modulation == "none":
        return lambda normed: F.linear(normed, weight, bias)
    gamma, delta = _modulation(config, parameters, time)
    if not fold:
        scale, shift = (1 + gamma)[:, None], delta[:, None]
        return lambda normed: F.linear(torch.addcmul(shift, normed, scale), weight, bias)
    own, offset = torch.addcmul(weight, weight, gamma[:, None]), F.linear(delta, weight, bias)
    if len(own) == 1:
        return lambda normed: F.linear(normed, own[0], offset[0])
    return lambda normed: torch.baddbmm(offset[:, None], normed, own.transpose(1, 2))


def _modulation(config: RouterConfig, parameters: Mapping[str, Tensor], time: Tensor) -> tuple[Tensor, Tensor]:
    """gamma and delta (B or 1, D) of equation 4."""
    modulation = time.to(parameters["hidden.weight"].dtype)
    if config.time_activation is not None:
        modulation = getattr(F, config.time_activation)(modulation)
    for name in ("modulation",) if config.modulation == "full" else ("modulation.0", "modulation.1"):
        modulation = F.linear(modulation, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))
    gamma, delta = modulation.chunk(2, dim=1)
    return gamma, delta


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
        if config.token_stride < 1:
            raise ValueError(f"RouterConfig.token_stride is {config.token_stride}: it is a number of tokens, 1 or more")
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

    @property
    def fully_open(self) -> bool:
        """Whether its heads are as `open_fully` leaves them: it was never trained."""
        closed = any(bool(head.weight.any()) for head in (self.gate, self.width))
        return not closed and bool((self.gate.bias == OPEN_LOGIT).all()) and bool(self.width.bias[-1] == OPEN_LOGIT)

    def forward(self, states: Sequence[Tensor], time: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of one call.

        Args:
            states: the block's token streams (B, ..., D), of which `read_streams` are read, joined along tokens.
            time: time embedding (B, E), or (1, E) shared by all rows.

        Returns:
            gate logits (B,) and width logits (B, |S|), in the router's dtype.
        """
        hidden = hidden_mean(self.config, dict(self.named_parameters()), states, time)
        return self.gate(hidden)[:, 0], self.width(hidden)
