"""Counts that are known, though the code reads them out of a tensor.

A tensor filled with one number has that number wherever it is read:

    item(full(sizes, v)[i]) = v

torch.export gives what is read a symbol of its own, of which nothing is known, so that what is cut by it has no
size either. In its place stands v itself, a number or an expression in the sizes of the inputs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from passes.graphs.shapes import tell_shapes

_aten = torch.ops.aten
_READS = (_aten.item.default, _aten._local_scalar_dense.default)
_PLACES = (_aten.unbind.int, _aten.select.int, _aten.split.Tensor, operator.getitem)
"""Operators that pick out of a tensor and leave its numbers as they are."""


def known_counts(module: fx.GraphModule) -> tuple[str, ...]:
    """Put what is known in the place of what is read, in place, with new shapes after it; says what was done."""
    reads = [node for node in module.graph.nodes if node.target in _READS]
    known = {node: fill for node in reads if (fill := _fill(node.args[0])) is not None}
    if not known:
        return ()
    for node, fill in known.items():
        node.replace_all_uses_with(fill)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    tell_shapes(module, [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")])
    return (f"{len(known)} counts read from tensors are known",)


def _fill(node: Any) -> Any:
    """The integer with which all of `node` is filled; None where it is not (narrower types may wrap around)."""
    while node.target in _PLACES:
        node = node.args[0]
    if node.target is not _aten.full.default or node.meta["val"].dtype is not torch.int64:
        return None
    value = node.args[1]
    return value if isinstance(value, int | fx.Node) else None
