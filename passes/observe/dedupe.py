"""Blocks that run the same code, found twice: before export to save the work, after it to share files.

Before: two blocks may share a graph when they agree in all that a trace can see without running:

    key = (modules and their settings, shapes and dtypes of weights, structure of the call,
           shapes of its tensors in every run, its constants, its time embedding, its adapter)

The key proposes and numbers decide: a member's own recorded calls must come out of the group's graph
with the member's weights (`passes.blocks.export.validate`), since code may read what no key holds.

After: a plan's name is a hash of its graphs. Nodes are numbered in order and symbolic sizes are left
nameless, so that the same code traced twice has one name, in any process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from passes.graphs.graph import BlockSite, Call, PlanGraph


def group_blocks(blocks: Sequence[BlockSite]) -> tuple[tuple[BlockSite, ...], ...]:
    """`blocks` in groups of equal key, groups and members in execution order."""
    groups: dict[tuple[object, ...], list[BlockSite]] = {}
    for site in blocks:
        groups.setdefault(_key(site), []).append(site)
    return tuple(tuple(members) for members in groups.values())


def plan_id(plan: PlanGraph, calling: object = ()) -> str:
    """A name for a plan's code: 16 hexadecimal digits, equal for equal graphs over equally shaped weights.

    `calling` is what else a plan must agree in to be the same, in a form whose `repr` tells.
    """
    digest = hashlib.sha256()
    digest.update(repr((plan.widths, plan.block.states, calling)).encode())
    for piece in plan.pieces:
        digest.update(repr((piece.name, piece.dim, piece.start, piece.size, piece.transposed, piece.rows)).encode())
    for variant in plan.variants:
        digest.update(_canonical(variant.graph).encode())
    return digest.hexdigest()[:16]


def graph_id(graph: fx.Graph) -> str:
    """A name for the code of one graph, as `plan_id` has it."""
    return hashlib.sha256(_canonical(graph).encode()).hexdigest()[:16]


def call_key(site: BlockSite) -> tuple[object, ...]:
    """What a block's code and the structure of its call are, sizes and numbers aside."""
    weights = (*site.module.named_parameters(), *site.module.named_buffers())
    call = site.calls[0]
    return (
        tuple((name, _class(module), module.extra_repr()) for name, module in site.module.named_modules()),
        tuple((name, tuple(value.shape), value.dtype) for name, value in weights),
        (str(call.spec), str(call.output_spec), *map(_kind, (*call.leaves, *call.outputs))),
        tuple(sorted(site.batch_dims.items())),
        site.time,
        repr(site.adapter),
    )


def _key(site: BlockSite) -> tuple[object, ...]:
    return (call_key(site), tuple(_structure(call) for call in site.calls))


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _structure(call: Call) -> tuple[object, ...]:
    """A call without the numbers in its tensors."""
    return (str(call.spec), str(call.output_spec), *map(_leaf, (*call.leaves, *call.outputs)))


def _leaf(leaf: object) -> object:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else _constant(leaf)


def _kind(leaf: object) -> object:
    return (leaf.dim(), leaf.dtype) if isinstance(leaf, Tensor) else _constant(leaf)


def _constant(leaf: object) -> object:
    """A module is itself alone; all else is what it says."""
    return id(leaf) if isinstance(leaf, nn.Module) else repr(leaf)


def _canonical(graph: fx.Graph) -> str:
    """`graph` as text that does not depend on the names of its nodes and symbols; placeholders keep theirs."""
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), number.__getitem__)
        target = node.target if node.op == "placeholder" else _operator(node)
        value = _shape(node.meta.get("val")) if node.op == "placeholder" else ""
        lines.append(f"{number[node]} {node.op} {target} {args} {kwargs} {value}")
    return "\n".join(lines)


def _operator(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {[size if isinstance(size, int) else '?' for size in value.shape]}"
