"""Attention without a dimension for heads, as attention of one head.

    sdpa(q, k, v, mask), all (B, L, D)     ->     sdpa(q', k', v', mask')[:, 0],  x' = x[:, None]

The same numbers, since what stands before (L, D) is batch. Engines' translations only know four dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from passes.graphs.graph import Report

NAME = "heads"
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_TOKENS = 3


def one_head(module: fx.GraphModule) -> tuple[fx.GraphModule, Report]:
    """`module`, changed in place; its nodes carry ``meta["val"]`` before and after."""
    done = []
    for node in module.graph.find_nodes(op="call_function", target=_ATTENTION):
        if node.meta["val"].dim() == _TOKENS:
            _give_head(module.graph, node)
            done.append(f"{node.name}: seen as one head")
    if done:
        module.graph.lint()
        module.recompile()
    return module, Report(NAME, tuple(done))


def _give_head(graph: fx.Graph, node: fx.Node) -> None:
    value: Tensor = node.meta["val"]
    with graph.inserting_before(node):
        node.args = tuple(_with_head(graph, argument) for argument in node.args)
        node.kwargs = {name: _with_head(graph, argument) for name, argument in node.kwargs.items()}
    node.meta["val"] = value.unsqueeze(1)
    with graph.inserting_after(node):
        without = graph.call_function(torch.ops.aten.squeeze.dim, (node, 1))
    without.meta["val"] = value
    node.replace_all_uses_with(without, delete_user_cb=lambda user: user is not without)


def _with_head(graph: fx.Graph, argument: Any) -> Any:
    """An argument of three dimensions with one for the head; others (a mask of (L, L), numbers) as they are."""
    if not isinstance(argument, fx.Node) or argument.meta["val"].dim() != _TOKENS:
        return argument
    given = graph.call_function(torch.ops.aten.unsqueeze.default, (argument, 1))
    given.meta["val"] = argument.meta["val"].unsqueeze(1)
    return given
