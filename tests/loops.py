"""A model that takes no time to run, and sampling loops around it, recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

import edit_compile
from edit_compile import Generation, Recording
from tests.models import noise

Loop = Callable[["Toy"], Tensor]
"""A whole generation with a model, which returns the last latents."""


class Toy(nn.Module):
    """Mixes channels and tokens of x (B, tokens, channels), moved by t (B,) and a prompt (B, channels).

    `bend` makes another model of it; `kept` is how many tokens of the output there are, `channels` how many channels.
    """

    def __init__(self, bend: float = 0.0, channels: int = 8, out: int | None = None, kept: slice | None = None) -> None:
        super().__init__()
        mix = noise(channels, out or channels, seed=3) * channels**-0.5
        self.mix = nn.Parameter(mix, requires_grad=False)
        self.bend, self.kept = bend, kept or slice(None)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        moved = x + prompt[:, None] * torch.cos(3 * t)[:, None, None].to(x.dtype)
        out = torch.tanh(moved + 0.3 * moved.roll(1, 1)) @ self.mix
        return ((out - self.bend * out**2)[:, self.kept],)


def prompt(seed: int, rows: int = 1, channels: int = 8) -> Tensor:
    return noise(rows, channels, seed=seed)


def recorded(model: Toy, loop: Loop) -> Generation:
    """What `model` is called with in `loop`, and what that ends with."""
    with tempfile.TemporaryDirectory() as folder:
        with edit_compile.record(model, folder) as recorder, recorder.generation():
            recorder.result(loop(model))
        return Recording(folder)[0]
