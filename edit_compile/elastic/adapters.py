"""Adapters of the peft library around a model's layers (LoRA and its kin), told by the package that defines them.

An adapter that can be merged is linear in the input of its layer, whatever it makes of the weights (DoRA too):

    y  =  W x + b + dW x  =  (W + dW) x + b

so that zeroing channels of x, at the input of the adapted layer as a whole, is what zeroing them is to the merged one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_adapter(module: nn.Module) -> bool:
    """Whether `module` is an adapter around another layer."""
    return type(module).__module__.partition(".")[0] == "peft" and hasattr(module, "get_base_layer")


def adds_nothing(adapter: Any) -> bool:
    """Whether an adapter gives exactly what its layer gives: it is fused into its weights, or switched off."""
    return bool(adapter.merged) != bool(adapter.disable_adapters)


@contextmanager
def adapters_aside(model: nn.Module, which: Callable[[nn.Module], bool] = is_adapter) -> Iterator[None]:
    """Inside the ``with`` block layers stand for the adapters around them, for those `which` is true of."""
    places: list[tuple[nn.Module, str, Any]] = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if is_adapter(child) and which(child) and not is_adapter(owner)
    ]
    for owner, name, adapter in places:
        owner._modules[name] = adapter.get_base_layer()
    try:
        yield
    finally:
        for owner, name, adapter in places:
            owner._modules[name] = adapter
