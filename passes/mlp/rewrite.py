"""Rewrite a block's graph to read only the leading rows of its weight pieces.

With k the channels that are kept, a linear map made of pieces becomes

    producer  W = [W_1; W_2]      x -> (W_1[k] x, W_2[k] x), joined only where somebody needs them joined
    consumer  W = [U_1, U_2]^T    (x_1, x_2) -> U_1[k]^T x_1 + U_2[k]^T x_2

and every literal that counts channels (bounds of splits and slices, sizes of views, groups of depthwise
convolutions) counts the kept ones instead. Splits along a joined dimension hand out the parts; what is
then unused is removed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from passes.graphs.graph import BlockGraph, WeightPiece
from passes.graphs.operators import IGNORED, arguments, is_elementwise, op_name
from passes.mlp.channels import FOREIGN, Channels, Elements

Bounds = Sequence[tuple[int, int]]
Parts = tuple[tuple[tuple[int, int], fx.Node], ...]
Pieces = Sequence[tuple[WeightPiece, fx.Node]]

_aten = torch.ops.aten
_SIZED = frozenset({"view", "reshape", "_unsafe_view", "expand"})
_CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
_CUTS = frozenset({"split", "split_with_sizes", "chunk"})


def narrow(
    block: BlockGraph,
    channels: Channels,
    keep: npt.NDArray[np.bool_],
    pieces: Sequence[WeightPiece],
    variant: int,
) -> fx.GraphModule:
    """The graph of one variant: placeholders are `pieces`, then the block's inputs.

    `keep[e]` says whether the variant keeps channel element e.
    """
    graph = _Narrowing(block, channels, keep, pieces).build()
    graph.eliminate_dead_code()
    graph.lint()
    module = fx.GraphModule(block.module, graph)
    _describe(module, block, pieces, variant)
    return module


class _Narrowing:
    """State of one rewrite: the new graph, and where values of the old one are found in it."""

    def __init__(
        self, block: BlockGraph, channels: Channels, keep: npt.NDArray[np.bool_], pieces: Sequence[WeightPiece]
    ) -> None:
        self.old = block.module.graph
        self.channels = channels
        self.keep = keep
        self.graph = fx.Graph()
        self.pieces: dict[str, list[tuple[WeightPiece, fx.Node]]] = {}
        for piece in pieces:
            self.pieces.setdefault(piece.source, []).append((piece, self.graph.placeholder(piece.name)))
        self.values: dict[fx.Node, Any] = {}
        self.joined: dict[fx.Node, tuple[int, Parts]] = {}

    def build(self) -> fx.Graph:
        for node in self.old.nodes:
            if op_name(node) in IGNORED or (node.op == "placeholder" and node.target in self.pieces):
                continue
            self.values[node] = self._rewrite(node)
        return self.graph

    def _rewrite(self, node: fx.Node) -> Any:
        name = op_name(node)
        if node.target is operator.getitem and isinstance(self.values[node.args[0]], list):  # type: ignore[index]
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        if name == "linear":
            return self._linear(node)
        if name in _CUTS or name == "slice":
            return self._cut(node)
        if name == "cat":
            return self._cat(node)
        if name in _SIZED and isinstance(node.args[1], (list, tuple)):
            return self._sized(node)
        if name in _CONVS:
            return self._conv(node)
        spread = is_elementwise(node) and len(node.all_input_nodes) == 1
        return (
            self._spread(node) if spread and self._value(node.all_input_nodes[0]) in self.joined else self._copy(node)
        )

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def _copy(self, node: fx.Node) -> fx.Node:
        return self.graph.node_copy(node, self._value)

    def _value(self, node: fx.Node) -> fx.Node:
        if node not in self.values:
            self.values[node] = self._whole(str(node.target))
        value: fx.Node = self.values[node]
        return value

    def _whole(self, weight: str) -> fx.Node:
        """A weight put together from its pieces, in the form that the block knows."""
        pieces = self.pieces[weight]
        nodes = [node for _, node in pieces]
        whole = nodes[0] if len(nodes) == 1 else self._call(_aten.cat.default, nodes, 0)
        piece = pieces[0][0]
        if piece.transposed:
            return self._call(_aten.transpose.int, whole, 0, piece.dim)
        scalar = self.channels.shapes[weight] == ()
        return self._call(_aten.reshape.default, whole, []) if scalar else whole

    def _count(self, elements: Elements) -> int:
        """How many of these channels are kept."""
        return int(np.sum((elements == FOREIGN) | self.keep[elements]))

    def _linear(self, node: fx.Node) -> fx.Node:
        given = arguments(node)
        pieces = self.pieces.get(str(given["weight"].target), [])
        if len(pieces) < 2:
            return self._copy(node)
        if not pieces[0][0].transposed:
            return self._produce(node, pieces)
        return self._contract(given, pieces)

    def _conv(self, node: fx.Node) -> fx.Node:
        given = arguments(node)
        pieces = self.pieces.get(str(given["weight"].target), [])
        whole = len(pieces) < 2 or pieces[0][0].transposed
        if given["groups"] == 1:
            return self._copy(node) if whole else self._produce(node, pieces)
        elements = self._elements(node, 1)
        if elements is None:
            return self._copy(node)
        x = self._value(given["input"])
        bounds = self._piece_bounds(pieces)
        if whole or self.joined.get(x, (0, ()))[0] != 1:
            return self._grouped(self._copy(node), self._count(elements))
        parts = self._produce_parts(node, pieces, self._take(x, 1, bounds))
        counted = [self._grouped(part, stop - start) for part, (start, stop) in zip(parts, bounds, strict=True)]
        return self._join(counted, bounds, 1)

    def _produce(self, node: fx.Node, pieces: Pieces) -> fx.Node:
        """One linear map or convolution per piece of its outputs."""
        x = self._value(arguments(node)["input"])
        axis = 1 if op_name(node) != "linear" else len(node.meta["val"].shape) - 1
        return self._join(self._produce_parts(node, pieces, [x] * len(pieces)), self._piece_bounds(pieces), axis)

    def _produce_parts(self, node: fx.Node, pieces: Pieces, inputs: Sequence[fx.Node]) -> list[fx.Node]:
        given = arguments(node)
        biases: Sequence[fx.Node | None] = [None] * len(pieces)
        if given["bias"] is not None:
            biases = self._take(self._bias(given["bias"]), 0, self._piece_bounds(pieces))
        parts = []
        for x, (_, weight), bias in zip(inputs, pieces, biases, strict=True):
            new = {given["input"]: x, given["weight"]: weight, given["bias"]: bias}
            parts.append(self.graph.node_copy(node, lambda old, new=new: new[old]))  # type: ignore[misc]
        return parts

    def _grouped(self, conv: fx.Node, groups: int) -> fx.Node:
        names = [argument.name for argument in conv.target._schema.arguments]  # type: ignore[union-attr]
        conv.args = conv.args[: names.index("groups")]
        conv.kwargs = {**conv.kwargs, "groups": groups}
        return conv

    def _spread(self, node: fx.Node) -> fx.Node:
        """An elementwise function of joined parts, part by part."""
        source = node.all_input_nodes[0]
        axis, parts = self.joined[self._value(source)]
        values = [self.graph.node_copy(node, lambda _, part=part: part) for _, part in parts]  # type: ignore[misc]
        return self._join(values, [bound for bound, _ in parts], axis)

    def _bias(self, bias: fx.Node) -> fx.Node:
        whole = self._value(bias)
        pieces = self.pieces.get(str(bias.target), [])
        if len(pieces) > 1:
            nodes = [node for _, node in pieces]
            self.joined[whole] = (0, tuple(zip(self._piece_bounds(pieces), nodes, strict=True)))
        return whole

    def _contract(self, given: Mapping[str, Any], pieces: Pieces) -> fx.Node:
        """A linear map whose input channels lie in several pieces: the sum over them."""
        axis = len(given["input"].meta["val"].shape) - 1
        parts = self._take(self._value(given["input"]), axis, self._piece_bounds(pieces))
        bias = None if given["bias"] is None else self._value(given["bias"])
        total: fx.Node | None = None
        for part, (piece, stored) in zip(parts, pieces, strict=True):
            weight = self._call(_aten.transpose.int, stored, 0, piece.dim)
            term = self._call(_aten.linear.default, part, weight, bias if total is None else None)
            total = term if total is None else self._call(_aten.add.Tensor, total, term)
        assert total is not None
        return total

    def _piece_bounds(self, pieces: Pieces) -> Bounds:
        elements = self.channels.of(pieces[0][0].source, pieces[0][0].dim)
        counts = [self._count(elements[piece.start : piece.start + piece.size]) for piece, _ in pieces]
        return list(pairwise(accumulate(counts, initial=0)))

    def _join(self, parts: Sequence[fx.Node], bounds: Bounds, axis: int) -> fx.Node:
        whole = self._call(_aten.cat.default, list(parts), axis)
        self.joined[whole] = (axis, tuple(zip(bounds, parts, strict=True)))
        return whole

    def _take(self, x: fx.Node, axis: int, bounds: Bounds) -> list[fx.Node]:
        """Ranges of one dimension of x: parts that were joined where they fit, else slices."""
        at, parts = self.joined.get(x, (axis, ()))
        known = dict(parts) if axis == at else {}
        return [known.get(bound) or self._slice(x, axis, known, bound) for bound in bounds]

    def _slice(
        self, x: fx.Node, axis: int, known: Mapping[tuple[int, int], fx.Node], bound: tuple[int, int]
    ) -> fx.Node:
        """One range: joined anew from whole parts, or cut from the one part that holds it, or from x."""
        start, stop = bound
        inside = [(low, high) for low, high in known if start <= low and high <= stop]
        if len(inside) > 1 and (inside[0][0], inside[-1][1]) == bound:
            shifted = [(low - start, high - start) for low, high in inside]
            return self._join([known[part] for part in inside], shifted, self.joined[x][0])
        for low, high in known:
            if low <= start and stop <= high:
                return self._call(_aten.slice.Tensor, known[low, high], axis, start - low, stop - low)
        return self._call(_aten.slice.Tensor, x, axis, start, stop)

    def _cut(self, node: fx.Node) -> Any:
        given = arguments(node)
        source, x = given["self"], self._value(given["self"])
        rank = len(source.meta["val"].shape)
        axis = given["dim"] % rank
        elements = self._elements(source, axis)
        joined = x in self.joined and self.joined[x][0] == axis
        if elements is None or (not joined and self._count(elements) == len(elements)):
            return self._copy(node)
        if op_name(node) == "slice":
            start, stop, _ = slice(given["start"], given["end"]).indices(len(elements))
            return self._take(x, axis, [self._moved(elements, start, max(start, stop))])[0]
        ends = accumulate((int(value.shape[axis]) for value in node.meta["val"]), initial=0)
        return self._take(x, axis, [self._moved(elements, start, stop) for start, stop in pairwise(ends)])

    def _elements(self, node: fx.Node, axis: int) -> Elements | None:
        dims = self.channels.dims.get(node)
        return None if dims is None else dims[axis].elements

    def _moved(self, elements: Elements, start: int, stop: int) -> tuple[int, int]:
        return self._count(elements[:start]), self._count(elements[:stop])

    def _cat(self, node: fx.Node) -> fx.Node:
        given, copied = arguments(node), self._copy(node)
        axis = given["dim"] % len(node.meta["val"].shape)
        elements = self._elements(node, axis)
        if elements is not None:
            sizes = [int(tensor.meta["val"].shape[axis]) for tensor in given["tensors"]]
            ends = list(pairwise(accumulate(sizes, initial=0)))
            bounds = [self._moved(elements, start, stop) for start, stop in ends]
            parts = [self._value(tensor) for tensor in given["tensors"]]
            self.joined[copied] = (axis, tuple(zip(bounds, parts, strict=True)))
        return copied

    def _sized(self, node: fx.Node) -> fx.Node:
        sizes = list(node.args[1])  # type: ignore[arg-type]
        for axis in range(len(sizes)):
            elements = self._elements(node, axis)
            if elements is not None and isinstance(sizes[axis], int) and sizes[axis] >= 0:
                sizes[axis] = self._count(elements)
        copied = self._copy(node)
        copied.update_arg(1, [self._value(size) if isinstance(size, fx.Node) else size for size in sizes])
        return copied


def _describe(module: fx.GraphModule, block: BlockGraph, pieces: Sequence[WeightPiece], variant: int) -> None:
    """Give every placeholder its meta["val"]; those of the other nodes are no longer true and go."""
    old = {str(node.target): node.meta["val"] for node in block.module.graph.nodes if node.op == "placeholder"}
    values = dict(old)
    for piece in pieces:
        with old[piece.source].fake_mode:
            values[piece.name] = piece.cut(old[piece.source])[: piece.rows[variant]]
    for node in module.graph.nodes:
        node.meta = {"val": values[str(node.target)]} if node.op == "placeholder" else {}
