"""The zoo's list: each family's file adds its cases to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CASES: dict[str, Callable[[], Case]] = {}

LEFT_OUT = {
    "MiniMaxMusic3RVQDepthDecoder": "an autoregressive decoder of audio codes; it has no timestep and denoises nothing",
}
"""Classes of diffusers.models.transformers that are no diffusion transformers, and why."""


@dataclass(frozen=True)
class Case:
    """A model in eval mode and the keyword arguments of one call of its forward.

    `timestep` names the argument that holds the timestep, where its name does not tell.
    """

    model: nn.Module
    inputs: dict[str, Any] = field(default_factory=dict)
    timestep: str | None = None


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Enter a maker of the model class `name`; the weights it draws are the same at every call, and none is zero."""

    def enter(make: Callable[[], Case]) -> Callable[[], Case]:
        def made() -> Case:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found = make()
                _fill(found.model)
            found.model.eval()
            return found

        assert name not in CASES, f"{name} is entered twice"
        CASES[name] = made
        return made

    return enter


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Draw anew what a model initialises to one constant (zero gates would hide whatever they multiply)."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1 and parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter) * 0.1)
