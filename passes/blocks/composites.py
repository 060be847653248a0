"""Operators that may give a view or a copy, as the case may be, are replaced by what they come to.

    unflatten(x, -1, [2, -1])  ->  view(x, [b, n, 2, 4])        chunk(x, 2)   ->  split(x, 4)
    to(x, x.dtype)             ->  x                            to(x, other)  ->  _to_copy(x, other)

torch.export does this by tracing the whole graph a second time. Here each such node is traced alone, which takes a
fraction of the time; a graph that writes to tensors, or holds graphs, is left to torch.export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from passes.graphs.shapes import question

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_KEPT = (torch.ops.aten.reshape.default,)


def without_composites(program: ExportedProgram) -> ExportedProgram:
    """`program` as one of functional operators; its placeholders stay, and its graph may be changed in place."""
    graph = program.graph
    if not all(_followed(node) for node in graph.nodes):
        return program.run_decompositions({})
    expanded = _Expanded(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_composite(node.target):
            expanded.put(node)
        else:
            expanded.sizes.setdefault(_size(node), node)
    for spec, result in zip(program.graph_signature.output_specs, graph.output_node().args[0], strict=True):
        if isinstance(result, fx.Node):
            spec.arg.name = result.name
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return program


def _followed(node: fx.Node) -> bool:
    """Whether a node is a tensor operator that writes to nothing, or arithmetic on sizes."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return not isinstance(node.target, torch._ops.OperatorBase)


def _is_composite(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target in _KEPT:
        return False
    aliases = any(argument.alias_info is not None for argument in target._schema.arguments)
    may = aliases or torch.Tag.maybe_aliasing_or_mutating in target.tags
    return may and target.has_kernel_for_dispatch_key(_COMPOSITE)


def _size(node: fx.Node) -> object:
    """What a node that gives a size is known by; of any other, itself."""
    value = node.meta.get("val")
    return value.node.expr if isinstance(value, SymInt) else node


class _Expanded:
    """A graph whose composite nodes are being replaced; `sizes` are the nodes that give sizes, by what they give."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.sizes: dict[object, fx.Node] = {}
        self._traced: dict[str, fx.Graph] = {}

    def put(self, node: fx.Node) -> None:
        """What `node` comes to in its place."""
        given = node.all_input_nodes
        inner = self._inner(node, given)
        twins = dict(zip(inner.find_nodes(op="placeholder"), given, strict=True))
        with self.graph.inserting_before(node):
            for part in inner.nodes:
                if part.op == "call_function":
                    twins[part] = self._placed(part, twins.__getitem__)
        results: Any = fx.map_arg(inner.output_node().args[0], twins.__getitem__)
        if isinstance(results, fx.Node):
            node.replace_all_uses_with(results)
        else:
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                self.graph.erase_node(user)
        self.graph.erase_node(node)

    def _placed(self, part: fx.Node, twin: Callable[[fx.Node], fx.Node]) -> fx.Node:
        known = self.sizes.get(_size(part))
        if known is not None:
            return known
        placed = self.graph.node_copy(part, twin)
        return self.sizes.setdefault(_size(placed), placed)

    def _inner(self, node: fx.Node, given: list[fx.Node]) -> fx.Graph:
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        places = [given.index(leaf) if isinstance(leaf, fx.Node) else None for leaf in leaves]

        def composite(*values: Any) -> Any:
            taken = [leaf if at is None else values[at] for leaf, at in zip(leaves, places, strict=True)]
            args, kwargs = pytree.tree_unflatten(taken, spec)
            return node.target.decompose(*args, **kwargs)  # type: ignore[union-attr]

        asked = f"{question(node)} {places}"
        if asked not in self._traced:
            self._traced[asked] = make_fx(composite)(*(one.meta["val"] for one in given)).graph
        return self._traced[asked]
