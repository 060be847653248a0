"""How channels move through each operator: the walk of passes.mlp.channels, one rule per kind of operator.

A rule takes the ledger, the node and the dimensions of its arguments, and gives the dimensions of its
result. An operator without a rule poisons every channel that it sees.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from passes.graphs.graph import BlockGraph
from passes.graphs.operators import (
    ACTIVATIONS,
    IGNORED,
    arguments,
    is_elementwise,
    op_name,
    same_dims,
    same_size,
    shape_of,
)
from passes.mlp.channels import FOREIGN, Channels, Contraction, Dim, Dims, Ledger

Value = Dims | tuple[Dims, ...]
Known = dict[fx.Node, Any]
Rule = Callable[[Ledger, fx.Node, Mapping[str, Any], Known], Value]


def trace_channels(block: BlockGraph) -> Channels:
    """Walk the block's graph and tie, poison and note its channels."""
    ledger = Ledger()
    known: Known = {}
    states = {block.inputs[index] for index in block.states}
    for node in block.module.graph.nodes:
        if node.op == "placeholder" and node.target in block.weights:
            known[node] = ledger.enter(str(node.target), tuple(int(size) for size in shape_of(node)))
        elif node.op == "placeholder" and _is_tensor(node):
            known[node] = _input_dims(node, node.target in states)
        elif node.op == "output":
            _poison_all(ledger, node, known, "is an output of the block")
        elif node.op == "get_attr" and _is_tensor(node):
            known[node] = tuple(Dim(source="a constant") for _ in shape_of(node))
        elif node.op == "call_function":
            known[node] = _apply(ledger, node, known)
    return ledger.close({node: dims for node, dims in known.items() if dims and isinstance(dims[0], Dim)})


def _apply(ledger: Ledger, node: fx.Node, known: Known) -> Value:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        whole = known.get(node.args[0], ())
        return whole[node.args[1]] if whole and not isinstance(whole[0], Dim) else ()
    if op_name(node) in IGNORED:
        return ()
    rule = _elementwise if is_elementwise(node) else RULES.get(op_name(node))
    if rule is None or node.target._schema.is_mutable:  # type: ignore[union-attr]
        return _unknown(ledger, node, known)
    return rule(ledger, node, arguments(node), known)


def _input_dims(node: fx.Node, state: bool) -> Dims:
    sizes = shape_of(node)
    source = f"the block's input {node.target}"
    return tuple(Dim(None, state and index > 0 and not same_size(size, 1), source) for index, size in enumerate(sizes))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _all_dims(node: fx.Node, known: Known) -> Iterator[Dim]:
    for argument in node.all_input_nodes:
        for item in known.get(argument, ()):
            yield from (item,) if isinstance(item, Dim) else item


def _poison_all(ledger: Ledger, node: fx.Node, known: Known, reason: str) -> None:
    for dim in _all_dims(node, known):
        ledger.poison(dim.elements, reason)


def _foreign(dim: Dim, name: str) -> Dim:
    """The dimension with its channels lost at operator `name`, or before where they were foreign already."""
    return replace(dim, elements=None, source=dim.source if dim.elements is None and dim.source else name)


def _unknown(ledger: Ledger, node: fx.Node, known: Known) -> Value:
    """Poison all; tokens survive where the result has the size of the first tensor argument."""
    name = op_name(node) or str(node.target)
    _poison_all(ledger, node, known, f"goes through {name} ({node.name})")
    values = node.meta.get("val")
    first = next((argument for argument in node.all_input_nodes if _is_tensor(argument)), None)

    def dims(value: object) -> Dims:
        if not isinstance(value, torch.Tensor):
            return ()
        if first is None or value.dim() != first.meta["val"].dim():
            return tuple(Dim(source=name) for _ in value.shape)
        alike = zip(known[first], shape_of(first), value.shape, strict=True)
        return tuple(Dim(None, dim.tokens and same_size(size, old), name) for dim, old, size in alike)

    return tuple(dims(value) for value in values) if isinstance(values, (tuple, list)) else dims(values)


def _elementwise(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    operands = [argument for argument in node.all_input_nodes if _is_tensor(argument)]
    reason = f"is combined by {op_name(node)} ({node.name}) with "
    result = [_broadcast(ledger, operands, known, size, -i, reason) for i, size in _from_right(shape_of(node))]
    if op_name(node) in ACTIVATIONS:
        for dim in result:
            ledger.activate(dim.elements)
    return tuple(reversed(result))


def _from_right(shape: Sequence[int | torch.SymInt]) -> Iterator[tuple[int, int | torch.SymInt]]:
    return enumerate(reversed(shape), start=1)


def _broadcast(
    ledger: Ledger, operands: Sequence[fx.Node], known: Known, size: int | torch.SymInt, index: int, reason: str
) -> Dim:
    merged: Dim | None = None
    for operand in operands:
        shape = shape_of(operand)
        if len(shape) < -index:
            continue
        dim = known[operand][index]
        if not same_size(shape[index], size):
            ledger.poison(dim.elements, "is broadcast over other channels")
            continue
        merged = dim if merged is None else _tied(ledger, merged, dim, reason)
    return merged or Dim()


def _tied(ledger: Ledger, one: Dim, other: Dim, reason: str) -> Dim:
    source = (one.source if one.elements is None else other.source) or other.source or one.source
    elements = ledger.tie(one.elements, other.elements, reason + (source or "channels that no weight makes"))
    return Dim(elements, one.tokens or other.tokens, source)


def _contract(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known, channel: int) -> Dim:
    """x[j] ~ W[., j]; gives the dimension of W's outputs."""
    weight, bias, x = given["weight"], given["bias"], known[given["input"]]
    out, into = known[weight][0], known[weight][1]
    source = x[channel].source or "channels that no weight makes"
    ledger.tie(x[channel].elements, into.elements, f"meets {source} at {node.name}")
    if bias is not None:
        out = _tied(ledger, out, known[bias][0], f"is shifted by {node.name} with ")
    ledger.produce(out.elements)
    tokens = any(dim.tokens for index, dim in enumerate(x) if index != channel % len(x))
    ledger.contractions.append(Contraction(node, str(weight.target), 1, tokens))
    return replace(out, tokens=False, source=f"the output of {node.name}")


def _linear(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    if given["weight"].op != "placeholder" or len(known[given["weight"]]) != 2:
        return _unknown(ledger, node, known)
    return (*known[given["input"]][:-1], _contract(ledger, node, given, known, -1))


def _conv(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    weight, x = given["weight"], known[given["input"]]
    if weight.op != "placeholder" or len(known[weight]) != len(x):
        return _unknown(ledger, node, known)
    sizes = shape_of(weight)
    if given["groups"] == 1:
        channel = _contract(ledger, node, given, known, 1)
    elif same_size(sizes[1], 1) and same_size(sizes[0], given["groups"]):
        channel = _tied(ledger, x[1], known[weight][0], f"is filtered by {node.name} with ")
        if given["bias"] is not None:
            channel = _tied(ledger, channel, known[given["bias"]][0], f"is shifted by {node.name} with ")
    else:
        return _unknown(ledger, node, known)
    for dim in x[2:]:
        ledger.poison(dim.elements, f"is convolved over ({node.name})")
    return (x[0], channel, *(_foreign(dim, node.name) for dim in x[2:]))


def _cut(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    """split, split_with_sizes, chunk: consecutive ranges of one dimension."""
    x = known[given["self"]]
    axis, start, parts = given["dim"] % len(x), 0, []
    for value in node.meta["val"]:
        size = value.shape[axis]
        elements = x[axis].elements
        if elements is not None:
            elements = elements[start : start + int(size)]
            start += int(size)
        parts.append((*x[:axis], replace(x[axis], elements=elements), *x[axis + 1 :]))
    return tuple(parts)


def _slice(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    x = known[given["self"]]
    axis = given["dim"] % len(x)
    elements = x[axis].elements
    if elements is not None:
        if given["step"] != 1 or isinstance(given["start"], fx.Node) or isinstance(given["end"], fx.Node):
            return _unknown(ledger, node, known)
        elements = elements[given["start"] : given["end"]]
    return (*x[:axis], replace(x[axis], elements=elements), *x[axis + 1 :])


def _select(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    """select and unbind: one dimension goes, and with it its channels."""
    x = known[given["self"]]
    axis = given["dim"] % len(x)
    ledger.poison(x[axis].elements, f"is taken apart by {node.name}")
    rest = (*x[:axis], *x[axis + 1 :])
    return tuple(rest for _ in node.meta["val"]) if op_name(node) == "unbind" else rest


def _cat(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    tensors = [known[tensor] for tensor in given["tensors"]]
    if any(len(x) != len(tensors[0]) for x in tensors):
        return _unknown(ledger, node, known)
    axis = given["dim"] % len(tensors[0])
    result = list(tensors[0])
    for x in tensors[1:]:
        for index, dim in enumerate(x):
            if index != axis:
                result[index] = _tied(ledger, result[index], dim, f"is joined by {node.name} with ")
    tokens = any(x[axis].tokens for x in tensors)
    source = next((x[axis].source for x in tensors if x[axis].elements is None), "")
    result[axis] = Dim(None, tokens, source)
    sizes = [shape_of(tensor)[axis] for tensor in given["tensors"]]
    if any(x[axis].elements is not None for x in tensors):
        pieces = [
            np.full(int(size), FOREIGN) if x[axis].elements is None else x[axis].elements
            for x, size in zip(tensors, sizes, strict=True)
        ]
        result[axis] = Dim(np.concatenate(pieces), tokens, source)
    return tuple(result)


def _permute(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    x = known[given["self"]]
    order = list(range(len(x)))
    if op_name(node) == "permute":
        order = [index % len(x) for index in given["dims"]]
    else:
        one, other = (given["dim0"], given["dim1"]) if "dim0" in given else (0, len(x) - 1)
        order[one], order[other] = order[other], order[one]
    return tuple(x[index] for index in order)


def _reshape(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    """view, reshape, squeeze, unsqueeze, flatten: kept dimensions keep their channels."""
    if "dtype" in given:
        return _unknown(ledger, node, known)
    x = known[given["self"]]
    kept, mixed, _ = same_dims(shape_of(given["self"]), shape_of(node))
    for index in mixed:
        if index not in kept.values():
            ledger.poison(x[index].elements, f"is mixed with other dimensions by {node.name}")
    tokens = any(x[index].tokens for index in mixed)
    sizes = shape_of(node)
    source = next((_foreign(x[index], op_name(node)).source for index in reversed(mixed)), "")
    return tuple(
        x[kept[index]] if index in kept else Dim(None, tokens and not same_size(size, 1), source)
        for index, size in enumerate(sizes)
    )


def _expand(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    x, sizes = known[given["self"]], shape_of(given["self"])
    result = [Dim() for _ in shape_of(node)]
    for index, size in _from_right(shape_of(node)):
        if index <= len(x) and same_size(sizes[-index], size):
            result[-index] = x[-index]
        elif index <= len(x):
            ledger.poison(x[-index].elements, f"is repeated by {node.name}")
    return tuple(result)


def _norm(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    x = known[given["input"]]
    count = len(given["normalized_shape"])
    affine = [known[given[key]] for key in ("weight", "bias") if given.get(key) is not None]
    for dim in (*x[-count:], *(dim for dims in affine for dim in dims)):
        ledger.poison(dim.elements, f"is normalised over ({node.name})")
    return (*x[:-count], *(_foreign(dim, op_name(node)) for dim in x[-count:]))


def _reduce(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    """Sums, means, softmax and the like: the channels reduced over are poisoned, the others pass."""
    x = known[given["self"]]
    axes = given.get("dim")
    axes = range(len(x)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    gone = {axis % len(x) for axis in axes}
    for axis in gone:
        ledger.poison(x[axis].elements, f"is reduced over by {op_name(node)} ({node.name})")
    if len(shape_of(node)) < len(x):
        return tuple(dim for axis, dim in enumerate(x) if axis not in gone)
    sizes = shape_of(node)
    return tuple(
        Dim(None, dim.tokens and not same_size(sizes[axis], 1), op_name(node)) if axis in gone else dim
        for axis, dim in enumerate(x)
    )


def _glu(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    x = known[given["self"]]
    axis = given["dim"] % len(x)
    half = shape_of(node)[axis]
    elements = x[axis].elements
    if elements is not None:
        elements = ledger.tie(
            elements[: int(half)], elements[int(half) :], f"is gated by {node.name} with foreign channels"
        )
        ledger.activate(elements)
    return (*x[:axis], replace(x[axis], elements=elements), *x[axis + 1 :])


def _size(ledger: Ledger, node: fx.Node, given: Mapping[str, Any], known: Known) -> Value:
    ledger.poison(known[given["self"]][given["dim"]].elements, f"has its size read by {node.name}")
    return ()


_KINDS: dict[Rule, str] = {
    _linear: "linear",
    _conv: "conv1d conv2d conv3d",
    _cut: "split split_with_sizes chunk",
    _slice: "slice",
    _select: "select unbind",
    _cat: "cat",
    _permute: "permute transpose t",
    _reshape: "view reshape _unsafe_view squeeze unsqueeze flatten",
    _expand: "expand",
    _norm: "layer_norm rms_norm",
    _reduce: "mean sum amax amin var std softmax _softmax log_softmax linalg_vector_norm cumsum",
    _glu: "glu",
    _size: "sym_size",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _KINDS.items() for name in names.split()}
