"""Graphs of blocks for the tests of passes.mlp.sites and passes.mlp.weights."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from passes.graphs.graph import BlockGraph, MlpSite, PlanGraph
from passes.mlp.sites import find_sites
from passes.mlp.weights import site_rows

aten = torch.ops.aten
OPERATORS = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
}


def written(
    function: Callable[..., object],
    weights: Mapping[str, Sequence[int]],
    inputs: Mapping[str, Sequence[int]],
    states: tuple[int, ...] = (0,),
) -> BlockGraph:
    """A block written as a function of proxies, weights then inputs, in ATen operators."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    nodes = [graph.placeholder(name) for name in (*weights, *inputs)]
    out = function(*(fx.Proxy(node, tracer) for node in nodes))
    outputs = out if isinstance(out, tuple) else (out,)
    graph.output(tuple(proxy.node for proxy in outputs))
    for node in graph.nodes:
        node.target = OPERATORS.get(node.target, node.target)
    module = fx.GraphModule(nn.Module(), graph)
    shapes = (*weights.values(), *inputs.values())
    FakeTensorProp(module, FakeTensorMode()).propagate(*(torch.empty(tuple(shape)) for shape in shapes))
    return BlockGraph(module, {name: name for name in weights}, tuple(inputs), tuple(range(len(inputs))), states)


class _Flat(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = self.inner(*tensors)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def exported(module: nn.Module, args: tuple[Tensor, ...], states: tuple[int, ...] = (0,)) -> BlockGraph:
    """A module's graph by torch.export, batch (dimension 0 of every input) dynamic."""
    batch = tuple({0: torch.export.Dim.AUTO} for _ in args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(_Flat(module.eval()), args, dynamic_shapes=(batch,), strict=False)
        program = program.run_decompositions({})
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    weights = {name: target.removeprefix("inner.") for name, target in targets.items()}
    names = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
    inputs = tuple(name for name in names if name not in weights)
    return BlockGraph(program.graph_module, weights, inputs, tuple(range(len(inputs))), states)


def random_tensors(block: BlockGraph, seed: int = 0) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Weights by placeholder name, and inputs, drawn at random; a symbolic batch becomes 3."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for node in block.module.graph.nodes:
        if node.op == "placeholder":
            shape = [size if isinstance(size, int) else 3 for size in node.meta["val"].shape]
            values[str(node.target)] = torch.randn(shape, generator=generator) / 2
    return {name: values[name] for name in block.weights}, [values[name] for name in block.inputs]


def masked(sites: Sequence[MlpSite], weights: Mapping[str, Tensor], width: float, alignment: int = 1) -> list[Tensor]:
    """Weights whose down-projections ignore the hidden channels beyond the width: zeros in their input columns."""
    copies = {name: weight.clone() for name, weight in weights.items()}
    for site in sites:
        rows = site_rows(site.hidden, width, alignment)
        for slot in site.contractions:
            copies[slot.weight].narrow(slot.dim, slot.start + rows, slot.size - rows).zero_()
    return list(copies.values())


def run_variant(
    plan: PlanGraph, index: int, weights: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """States of one variant on the pieces cut from the block's weights."""
    pieces = [piece.cut(weights[piece.source])[: piece.rows[index]] for piece in plan.pieces]
    return plan.variants[index](*pieces, *inputs)


def hiddens(block: BlockGraph) -> list[int]:
    """Hidden sizes of the sites found, for short assertions."""
    return [site.hidden for site in find_sites(block)[0]]
