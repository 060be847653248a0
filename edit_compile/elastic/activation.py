"""Another activation for a model's MLPs: act(W1 x + b1) with `act` exchanged in the model itself.

An MLP is a module whose `net` begins with a module that holds the up-projection `proj` and applies the activation, and
goes on to a linear that contracts what `proj` makes, as diffusers' FeedForward does. `proj` keeps its name and its
parameters, so that the names in a state dict stay. MLPs with a gate (GEGLU, SwiGLU) have no such form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edit_compile.elastic.layout import ElasticError


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class Activated(nn.Module):
    """act(W1 x + b1) over the up-projection `proj`; `name` is that of `act` (see `set_activation`)."""

    def __init__(self, proj: nn.Linear, name: str) -> None:
        super().__init__()
        self.proj, self.name = proj, name
        self._function = _function(name)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden channels (..., H) of tokens (..., D)."""
        return self._function(self.proj(x))

    def extra_repr(self) -> str:
        """The activation: what tells blocks with different ones apart."""
        return self.name


def set_activation(model: nn.Module, name: str) -> int:
    """Give all MLPs of `model` the activation `name`; returns how many there are.

    Args:
        model: changed in place; parameters and state-dict names stay.
        name: "quick_gelu" (x sigmoid(1.702 x)) or a function of torch.nn.functional.

    Raises:
        ElasticError: there is no such activation, or no MLP whose activation can be exchanged.
    """
    found = mlps(model, name)
    for mlp in found:
        mlp.net[0] = Activated(mlp.proj, name).train(mlp.proj.training)
    return len(found)


@dataclass(frozen=True)
class Mlp:
    """An MLP of a model: the qualified name of the module that holds `net`, and the up-projection."""

    name: str
    net: nn.ModuleList | nn.Sequential
    proj: nn.Linear


def mlps(model: nn.Module, name: str) -> list[Mlp]:
    """All MLPs of `model` that `set_activation` would give `name`, in order; ElasticError as there."""
    _function(name)
    found = []
    for owner, module in model.named_modules():
        net = getattr(module, "net", None)
        if not isinstance(net, nn.ModuleList | nn.Sequential) or not len(net):
            continue
        first, *others = net.children()
        proj = getattr(first, "proj", None)
        down = next((layer for layer in others if isinstance(layer, nn.Linear)), None)
        if isinstance(proj, nn.Linear) and down is not None and down.in_features == proj.out_features:
            found.append(Mlp(owner, net, proj))
    if not found:
        raise ElasticError(
            f"{type(model).__name__} has no MLP whose activation can be set to {name!r}: none is an up-projection "
            "`net[0].proj`, an activation without a gate, and a linear"
        )
    return found


def _function(name: str) -> Callable[[Tensor], Tensor]:
    if name == "quick_gelu":
        return quick_gelu
    function = getattr(F, name, None)
    if name.startswith("_") or not callable(function):
        raise ElasticError(f"no activation {name!r}: use 'quick_gelu' or a function of torch.nn.functional")
    return cast(Callable[[Tensor], Tensor], function)
