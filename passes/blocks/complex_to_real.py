"""Complex arithmetic as arithmetic of real pairs: engines have no complex numbers, rotary positions do.

A complex tensor z = a + ib of shape S is held as a real tensor of shape S + (2,), its last dimension
(a, b), which is what ``view_as_real`` gives. Then

    view_as_complex(x) = x           view_as_real(z) = z            real(z), imag(z) = a, b
    complex(a, b)      = (a, b)      polar(r, t)     = (r cos t, r sin t)
    conj(z)            = (a, -b)     -z              = (-a, -b)
    z + w, z - w       = pairwise    z x             = (a x, b x)   for real x
    z w                = (a c - b d, a d + b c)                     for w = c + id

and whatever only moves elements (reshape, permute, slice, cat, ...) moves pairs: the same operator
over the leading dimensions, with its dimension numbers counted from the front. A complex input, weights
included, becomes a real one with a trailing dimension of 2: the caller passes ``view_as_real`` of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from passes.graphs.graph import Refusal, Report

aten = torch.ops.aten
Argument = fx.node.Argument
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class _Unknown(Exception):
    """A complex value met an operator that no rule covers."""


def complex_to_real(module: fx.GraphModule) -> tuple[fx.GraphModule, Report]:
    """`module` without complex values, and which of its inputs became real.

    Nodes must carry ``meta["val"]``. A graph without complex values comes back as it is; so does one
    with an operator that no rule covers, then with a refusal that names the operator.
    """
    if not any(_is_complex(node) for node in module.graph.nodes):
        return module, Report("real")
    try:
        graph, done = _Rewrite(module.graph).run()
    except _Unknown as error:
        return module, Report("real", refused=(Refusal(str(error.args[0]), str(error.args[1])),))
    result = fx.GraphModule(torch.nn.Module(), graph)
    result.meta = dict(module.meta)
    return result, Report("real", tuple(done))


def as_real(leaf: object) -> Tensor:
    """The tensor that a graph made real takes for `leaf`: a complex one with a trailing dimension of two."""
    assert isinstance(leaf, Tensor)
    return torch.view_as_real(leaf) if leaf.is_complex() else leaf


def _is_complex(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves)


class _Rewrite:
    """One pass over a graph, in order; `twins` maps each old node to what holds its value."""

    def __init__(self, graph: fx.Graph) -> None:
        self.old = graph
        self.new = fx.Graph()
        self.twins: dict[fx.Node, fx.Node] = {}
        self.done: list[str] = []

    def run(self) -> tuple[fx.Graph, list[str]]:
        for node in self.old.nodes:
            self.twins[node] = self._node(node)
        self.new.eliminate_dead_code()
        self.new.lint()
        return self.new, self.done

    def _node(self, node: fx.Node) -> fx.Node:
        touched = _is_complex(node) or any(_is_complex(source) for source in node.all_input_nodes)
        if not touched:
            return self.new.node_copy(node, self.twins.__getitem__)
        if node.op == "placeholder":
            return self._placeholder(node)
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            raise _Unknown(node.name, f"no rule for a complex value at {node.target}")
        return rule(self, node)

    def _placeholder(self, node: fx.Node) -> fx.Node:
        twin = self.new.node_copy(node)
        twin.meta["val"] = torch.view_as_real(node.meta["val"])
        dtype = _REAL[node.meta["val"].dtype]
        self.done.append(
            f"input {node.target} becomes {str(dtype).removeprefix('torch.')} with a trailing dimension of 2"
        )
        return twin

    def emit(self, target: Callable[..., object], *args: Argument, **kwargs: Argument) -> fx.Node:
        """A new node with its fake value."""
        node = self.new.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def parts(self, pair: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Real and imaginary part."""
        return self.emit(aten.select.int, pair, -1, 0), self.emit(aten.select.int, pair, -1, 1)

    def pair(self, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        return self.emit(aten.stack.default, [real, imaginary], -1)


Rule = Callable[[_Rewrite, fx.Node], fx.Node]


def _same(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    return rewrite.twins[_operand(node, 0)]


def _part(index: int) -> Rule:
    return lambda rewrite, node: rewrite.emit(aten.select.int, rewrite.twins[_operand(node, 0)], -1, index)


def _complex(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    return rewrite.pair(rewrite.twins[_operand(node, 0)], rewrite.twins[_operand(node, 1)])


def _polar(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    radius, angle = (rewrite.twins[_operand(node, at)] for at in (0, 1))
    sides = (rewrite.emit(function, angle) for function in (aten.cos.default, aten.sin.default))
    return rewrite.pair(*(rewrite.emit(aten.mul.Tensor, radius, side) for side in sides))


def _conjugate(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    real, imaginary = rewrite.parts(rewrite.twins[_operand(node, 0)])
    return rewrite.pair(real, rewrite.emit(aten.neg.default, imaginary))


def _multiply(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    left, right = node.args[:2]
    if not (isinstance(left, fx.Node) and _is_complex(left)):
        left, right = right, left
    assert isinstance(left, fx.Node)
    pair = rewrite.twins[left]
    if not isinstance(right, fx.Node):
        if isinstance(right, complex):
            raise _Unknown(node.name, "no rule for a product with a complex number")
        return rewrite.emit(aten.mul.Scalar, pair, right)
    if not isinstance(right.meta["val"], Tensor):
        raise _Unknown(node.name, "no rule for a product with a symbolic number")
    if not _is_complex(right):
        return rewrite.emit(aten.mul.Tensor, pair, rewrite.emit(aten.unsqueeze.default, rewrite.twins[right], -1))
    (a, b), (c, d) = rewrite.parts(pair), rewrite.parts(rewrite.twins[right])
    product = [rewrite.emit(aten.mul.Tensor, *factors) for factors in ((a, c), (b, d), (a, d), (b, c))]
    real = rewrite.emit(aten.sub.Tensor, product[0], product[1])
    return rewrite.pair(real, rewrite.emit(aten.add.Tensor, product[2], product[3]))


def _pairwise(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    """An operator that acts on real and imaginary parts alike; all its tensors must be complex."""
    if not all(isinstance(value, fx.Node) and _is_complex(value) for value in node.args):
        raise _Unknown(node.name, f"no rule for {node.target} of a complex and a real value")
    return _again(rewrite, node, node.args)


def _cast(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    dtype = node.kwargs.get("dtype")
    if not _is_complex(node) or not _is_complex(_operand(node, 0)):
        raise _Unknown(node.name, "no rule for a cast between real and complex")
    wanted = {"dtype": _REAL[dtype]} if isinstance(dtype, torch.dtype) else {}
    kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"} | wanted
    return rewrite.emit(node.target, rewrite.twins[_operand(node, 0)], **kwargs)  # type: ignore[arg-type]


def _plainly(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    """An operator without dimension numbers, or a pick from its results."""
    return _again(rewrite, node, node.args)


def _counted(*positions: int, grows: int = 0) -> Rule:
    """An operator whose arguments at `positions` are dimension numbers; `grows` dimensions are added."""

    def rule(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
        rank = _rank(node.args[0]) + grows
        args = list(node.args)
        for at in positions:
            if at < len(args):
                args[at] = _from_front(args[at], rank)
        return _again(rewrite, node, args)

    return rule


def _split(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    args = [*node.args, 0] if len(node.args) == 2 else list(node.args)
    return _again(rewrite, node, [*args[:2], _from_front(args[2], _rank(node.args[0]))])


def _permute(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    rank = _rank(node.args[0])
    dims = _from_front(node.args[1], rank)
    return _again(rewrite, node, [node.args[0], [*dims, rank]])  # type: ignore[misc]


def _shaped(rewrite: _Rewrite, node: fx.Node) -> fx.Node:
    """An operator whose second argument is a shape."""
    shape = node.args[1]
    assert isinstance(shape, Sequence)
    return _again(rewrite, node, [node.args[0], [*shape, 2]])


def _again(rewrite: _Rewrite, node: fx.Node, args: Sequence[Argument]) -> fx.Node:
    twins = fx.map_arg(tuple(args), rewrite.twins.__getitem__)
    kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    return rewrite.emit(node.target, *twins, **fx.map_arg(kwargs, rewrite.twins.__getitem__))  # type: ignore[arg-type]


def _operand(node: fx.Node, position: int) -> fx.Node:
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return operand


def _rank(value: Argument) -> int:
    first = value[0] if isinstance(value, list | tuple) else value
    assert isinstance(first, fx.Node)
    return first.meta["val"].ndim


def _from_front(dims: Argument, rank: int) -> Argument:
    if isinstance(dims, list | tuple):
        return [_from_front(dim, rank) for dim in dims]
    assert isinstance(dims, int)
    return dims % rank


_RULES: dict[object, Rule] = {
    aten.view_as_complex.default: _same,
    aten.view_as_real.default: _same,
    aten.resolve_conj.default: _same,
    aten.real.default: _part(0),
    aten.imag.default: _part(1),
    aten.complex.default: _complex,
    aten.polar.default: _polar,
    aten._conj.default: _conjugate,
    aten.conj.default: _conjugate,
    aten._conj_physical.default: _conjugate,
    aten.conj_physical.default: _conjugate,
    aten.mul.Tensor: _multiply,
    aten.mul.Scalar: _multiply,
    aten.add.Tensor: _pairwise,
    aten.sub.Tensor: _pairwise,
    aten.neg.default: _pairwise,
    aten._to_copy.default: _cast,
    aten.clone.default: _plainly,
    aten.alias.default: _plainly,
    aten.detach.default: _plainly,
    operator.getitem: _plainly,
    aten.unsqueeze.default: _counted(1, grows=1),
    aten.squeeze.dim: _counted(1),
    aten.squeeze.dims: _counted(1),
    aten.transpose.int: _counted(1, 2),
    aten.select.int: _counted(1),
    aten.slice.Tensor: _counted(1),
    aten.index_select.default: _counted(1),
    aten.sym_size.int: _counted(1),
    aten.index.Tensor: _plainly,
    aten.cat.default: _counted(1),
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.permute.default: _permute,
    aten.reshape.default: _shaped,
    aten.view.default: _shaped,
    aten._unsafe_view.default: _shaped,
    aten.expand.default: _shaped,
}
