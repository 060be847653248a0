"""Flex attention as attention with a mask.

The operator carries two graphs of scalars: what a score becomes, s' = score(s, b, h, q, k), and who sees whom,
m(b, h, q, k). Run eagerly it computes

    softmax over k of (s'(scale QK^T) where m, -inf elsewhere) V

over all tokens: the lists of blocks beside m say which tiles a compiled kernel may leave out, and eager torch
pays no heed to them. Neither does this pass. With s' = s that is ``scaled_dot_product_attention(Q, K, V, M, scale)``,

    M = none                         where m is constantly true
    M[b, h, q, k] = m(b, h, q, k)    on arange(B)[:, None, None, None], ..., arange(L_k): every operator of m is
                                     pointwise, or a lookup with an index for each dimension, so that m of
                                     ranges is the range of m, by broadcasting

Everything else is refused: other scores, a row of another head count or batch in keys and values, and results that
only flex attention has (the log of its sum, its largest score).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from passes.graphs.graph import Refusal, Report

_aten = torch.ops.aten
_FLEX = torch.ops.higher_order.flex_attention
_CONSTANTS = {_aten.new_ones.default: None, _aten.ones.default: None, _aten.new_full.default: 2, _aten.full.default: 1}
"""Operators that make a constant, and which argument holds its value (None: it is one)."""

_POINTWISE = {
    _aten.__and__.Tensor: _aten.bitwise_and.Tensor,
    _aten.__or__.Tensor: _aten.bitwise_or.Tensor,
    _aten.__xor__.Tensor: _aten.bitwise_xor.Tensor,
}
"""Operators that torch does not call pointwise, and their twins that it does."""

_UNTAGGED = (_aten.floor_divide.default, _aten.floor_divide.Scalar)
"""Operators that are pointwise, though torch does not say so."""


class _Strange(Exception):
    """This attention is not attention with a mask; the message says why."""


def dense_attention(module: fx.GraphModule) -> Report:
    """Replace every flex attention in the graph of `module`, in place; a refused one stays as it is."""
    done: list[str] = []
    refused: list[Refusal] = []
    for node in module.graph.find_nodes(op="call_function", target=_FLEX):
        try:
            masked = _replace(module, node)
        except _Strange as reason:
            refused.append(Refusal(node.name, str(reason)))
        else:
            told = "with its mask" if masked else "over all tokens"
            done.append(f"{node.name} is attention {told}, its lists of blocks unheeded as in eager torch")
    if done:
        for node in module.graph.find_nodes(op="get_attr"):
            if not node.users:
                module.graph.erase_node(node)
        module.graph.lint()
    return Report("flex", tuple(done), tuple(refused))


def _replace(module: fx.GraphModule, node: fx.Node) -> bool:
    """Put plain attention in the place of `node`, and tell whether it has a mask."""
    query, key, value, score, blocks, scale, _options, scored, buffers = node.args
    if scored or not _keeps_scores(_subgraph(module, score)):
        raise _Strange("its flex attention changes the scores")
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        raise _Strange("more than the result of its flex attention is used")
    sizes = [tuple(tensor.meta["val"].shape[:2]) for tensor in (query, key, value)]  # type: ignore[union-attr]
    if sizes[1:] != sizes[:1] * 2:
        raise _Strange(f"the batch and heads of its flex attention differ: {', '.join(map(str, sizes))}")
    rule = _subgraph(module, blocks[-1])  # type: ignore[index]
    constant = _constant(rule)
    if constant is False:
        raise _Strange("the mask of its flex attention lets nobody see anybody")
    with module.graph.inserting_before(node):
        mask = None if constant else _mask(module.graph, rule, query, key, buffers)
        args = (query, key, value, mask, 0.0, False)
        result = _call(module.graph, _aten.scaled_dot_product_attention.default, args, {"scale": scale})
    for user in list(node.users):
        user.replace_all_uses_with(result)
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    return mask is not None


def _subgraph(module: fx.GraphModule, node: Any) -> fx.Graph:
    inner = getattr(module, node.target)
    assert isinstance(inner, fx.GraphModule)
    return inner.graph


def _keeps_scores(graph: fx.Graph) -> bool:
    return graph.output_node().args[0] is next(iter(graph.find_nodes(op="placeholder")))


def _constant(graph: fx.Graph) -> bool | None:
    """The value of a mask that is the same everywhere."""
    result = graph.output_node().args[0]
    if not isinstance(result, fx.Node) or result.target not in _CONSTANTS:
        return None
    place = _CONSTANTS[result.target]
    return place is None or bool(result.args[place])


def _mask(graph: fx.Graph, rule: fx.Graph, query: Any, key: Any, buffers: Any) -> fx.Node:
    """Nodes that give the mask for every row, head, query and key; sizes of one where it is the same for all."""
    ranges = [_range(graph, *of, 3 - at) for at, of in enumerate(((query, 0), (query, 1), (query, 2), (key, 2)))]
    twins: dict[fx.Node, Any] = dict(zip(rule.find_nodes(op="placeholder"), [*ranges, *buffers], strict=True))
    for node in rule.nodes:
        if node.op in ("placeholder", "output"):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), twins.get)
        target: Any = _POINTWISE.get(node.target, node.target)
        if not _means_same(target, args):
            raise _Strange(f"the mask of its flex attention holds {target}")
        twins[node] = _call(graph, target, args, kwargs)
    result: fx.Node = twins[rule.output_node().args[0]]  # type: ignore[index]
    dims = result.meta["val"].dim()
    if not dims:
        raise _Strange("the mask of its flex attention heeds neither tokens nor heads nor rows")
    return result if dims > 1 else _call(graph, _aten.unsqueeze.default, (result, 0), {})


def _means_same(target: Any, args: Sequence[Any]) -> bool:
    """Whether an operator of scalars, called with ranges (`args`) instead, gives the range of what it gave."""
    if target is _aten.index.Tensor:
        table, indices = args
        return table.meta["val"].dim() == len(indices) and None not in indices
    if target in _CONSTANTS:
        return list(args[0 if target in (_aten.ones.default, _aten.full.default) else 1]) == []
    return target in _UNTAGGED or torch.Tag.pointwise in getattr(target, "tags", ())


def _range(graph: fx.Graph, tensor: fx.Node, dim: int, after: int) -> fx.Node:
    """0 .. size of `dim` of `tensor`, with `after` dimensions of size one behind it."""
    size: Any = tensor.meta["val"].shape[dim]
    if not isinstance(size, int):
        size = _call(graph, _aten.sym_size.int, (tensor, dim), {})
    device = tensor.meta["val"].device
    made = _call(graph, _aten.arange.default, (size,), {"device": device, "pin_memory": False}, tensor.meta["val"])
    for _ in range(after):
        made = _call(graph, _aten.unsqueeze.default, (made, -1), {})
    return made


def _call(graph: fx.Graph, target: Any, args: Sequence[Any], kwargs: dict[str, Any], like: Any = None) -> fx.Node:
    """A node with what it gives in ``meta["val"]``."""
    node = graph.call_function(target, tuple(args), kwargs)
    values = fx.map_arg((node.args, node.kwargs), lambda given: given.meta["val"])
    fakes = [value for value in torch.utils._pytree.tree_leaves((values, like)) if isinstance(value, FakeTensor)]
    with fakes[0].fake_mode:
        node.meta["val"] = target(*values[0], **values[1])
    return node
