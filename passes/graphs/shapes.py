"""The shapes of what a graph's nodes give: computed anew after a change, and which sizes are symbols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

_OTHERS = (3, 5, 8, 17, 64)
"""Batches that no run had."""

_OF_NUMBERS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def tell_shapes(module: fx.GraphModule, inputs: Sequence[Any], like: fx.Graph | None = None) -> None:
    """Set ``meta["val"]`` of every node, in place, where the placeholders are `inputs` (fake tensors, symbols).

    What operators of `like` give, whose nodes know it, is not computed again where it is asked for in `module`.
    """
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    known = {} if like is None else {question(node): node.meta["val"] for node in like.nodes if _is_plain(node)}
    with torch.no_grad(), enable_python_dispatcher():  # some operators know symbols in Python alone
        _Telling(module, mode, known).propagate_dont_convert_inputs(*inputs)


def question(node: fx.Node) -> str:
    """All that what a node gives depends on, but for numbers: its operator, its constants, and what tensors it takes.

    The nodes that it takes know what they give.
    """
    return repr((node.target, fx.map_arg((node.args, node.kwargs), lambda given: _told(given.meta["val"]))))


def _told(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, value.device, tuple(value.shape), value.stride(), value.is_conj(), value.is_neg())
    return tuple(map(_told, value)) if isinstance(value, (tuple, list)) else value


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is an operator that gives no size of its own making."""
    return node.op == "call_function" and not set(_OF_NUMBERS).intersection(getattr(node.target, "tags", ()))


class _Telling(FakeTensorProp):
    """Computes what nodes give, each question once."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, known: dict[str, Any]) -> None:
        super().__init__(module, mode)
        self._known = known

    def run_node(self, n: fx.Node) -> Any:
        """What `n` gives, from what is known where it was asked before."""
        if not _is_plain(n):
            return super().run_node(n)
        asked = question(n)
        if asked in self._known:
            n.meta["val"] = self._known[asked]
        else:
            self._known[asked] = super().run_node(n)
        return self._known[asked]


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
