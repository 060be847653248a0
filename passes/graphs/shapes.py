"""The shapes of what a graph's nodes give: computed anew after a change, and which sizes are symbols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

_OTHERS = (3, 5, 8, 17, 64)
"""Batches that no run had."""


def tell_shapes(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Set ``meta["val"]`` of every node, in place, where the placeholders are `inputs` (fake tensors, symbols)."""
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with torch.no_grad(), enable_python_dispatcher():  # some operators know symbols in Python alone
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*inputs)


def is_free(size: int | torch.SymInt) -> bool:
    """Whether a size is a symbol still: an export may pin one and keep its wrapper."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def fits_any(size: int | torch.SymInt) -> bool:
    """Whether a size is a symbol of which nothing was assumed in tracing but what other sizes meet as well.

    One size may be an exception, as where code compares it with another.
    """
    if not is_free(size):
        return False
    environment = size.node.shape_env  # type: ignore[union-attr]
    symbols = size.node.expr.free_symbols  # type: ignore[union-attr]
    for assumption in environment.guards:
        assumed = environment.replace(assumption.expr)
        if assumed.free_symbols and assumed.free_symbols <= symbols:
            unmet = [n for n in _OTHERS if assumed.subs(dict.fromkeys(symbols, n)) == sympy.false]
            if len(unmet) > 1:
                return False
    return True
