"""A correction of the bias for every width at once: down-projections that take their input less its mean.

With m the mean of the hidden channels a,

    W a + b  =  W (a - m) + (b + W m)

and a width that leaves channel j out now leaves out W[., j] (a[j] - m[j]), so that its mean stays where it was, in the
bias: the correction of FLAP (An et al. 2023), which needs no bias of its own for each width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.elastic.layout import Layout, MaskedInput


class Centred(nn.Module):
    """``linear(x - mean)``, with `mean` (in_features,) in the dtype of `linear`; what it lacks is the linear's."""

    mean: Tensor

    def __init__(self, linear: nn.Linear, mean: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("mean", mean)
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features) of x (..., in_features)."""
        return self.linear(x - self.mean)

    def __getattr__(self, name: str) -> Any:
        """The linear's attribute where this module has none: models read `weight.dtype` of their linears."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "linear" or name.startswith("__"):
                raise
            return getattr(self.linear, name)


@torch.no_grad()
def centred_linears(model: nn.Module, means: Mapping[nn.Module, Tensor]) -> dict[nn.Module, Centred]:
    """For each linear of `model`, with the mean (in_features,) of its input, one that computes the same to rounding.

    Both share their weight, called `linear.weight` in the second; a linear without a bias gets one. Left out are
    modules that are no plain floating-point nn.Linear, linears that are centred already, and means that are zero.
    """
    inside = {module.linear for module in model.modules() if isinstance(module, Centred)}
    made: dict[nn.Module, Centred] = {}
    for linear, mean in means.items():
        if linear in inside or type(linear) is not nn.Linear or not (linear.weight.is_floating_point() and mean.any()):
            continue
        rounded = mean.to(linear.weight)
        added = linear.weight.double() @ rounded.double()
        bias = added if linear.bias is None else linear.bias.double() + added
        made[linear] = Centred(_like(linear, bias), rounded)
    return made


def exchange(model: nn.Module, pairs: Mapping[Any, nn.Module]) -> None:
    """Put the second of each pair wherever `model` has the first."""
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child in pairs:
                owner._modules[name] = pairs[child]


def centred_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the centred linears of `model`."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, Centred))


@contextmanager
def centred_places(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Context manager: the linears `names` of `model` are centred, to load weights into; no longer if that fails."""
    pairs: dict[nn.Module, Centred] = {}
    for linear in map(model.get_submodule, names):
        assert isinstance(linear, nn.Linear)
        mean, bias = (linear.weight.new_zeros(size) for size in (linear.in_features, linear.out_features))
        pairs[linear] = Centred(_like(linear, bias), mean)
    exchange(model, pairs)
    try:
        yield
    except BaseException:
        exchange(model, {new: old for old, new in pairs.items()})
        raise


def with_centred(layout: Layout, names: Collection[str]) -> Layout:
    """The layout when linears `names` are centred: hidden channels are masked behind the mean."""

    def moved(block: str, mask: MaskedInput) -> MaskedInput:
        return replace(mask, module=f"{mask.module}.linear") if f"{block}.{mask.module}" in names else mask

    blocks = (replace(b, masks=tuple(moved(b.name, mask) for mask in b.masks)) for b in layout.blocks)
    return replace(layout, blocks=tuple(blocks))


def _like(linear: nn.Linear, bias: Tensor) -> nn.Linear:
    """A linear of the same weight, and the bias (out_features,) in its dtype."""
    weight = linear.weight
    made = nn.Linear(linear.in_features, linear.out_features, device="meta").train(linear.training)
    made.weight, made.bias = weight, nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
    return made
