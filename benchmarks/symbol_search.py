"""The MLPs of a block found by torch.export's symbols instead of passes/mlp (see benchmarks.hidden_symbols).

    candidate   a linear or convolution W2 with an activation between it and the maps W1 that feed it
    marked      dimension 1 of W2 and of what else reads W1's channels; dimension 0 of W1, of biases and scales between
    split rule  what has twice as many channels as W2 takes, a packed GLU, is given as [2, H, ..], with H marked
    group rule  depthwise convolutions take their number of groups from the weight that they are given
    found       W2's size is a symbol s, or s + c where c other channels are joined to the hidden ones, and W1's is s
    equal       the one graph, given a prefix of the weights (width .5), computes what the masked block computes

Candidates are looked for in the graph that passes/blocks made. The block's code is exported; where that pins the size,
the code with the group rule, if it has such convolutions, and the graph itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.func import functional_call
from torch.utils import _pytree as pytree

from passes.blocks.complex_to_real import as_real
from passes.blocks.export import weight_values
from passes.blocks.quiet_export import exported, why
from passes.graphs.graph import BlockGraph, MlpSite, Slot
from passes.graphs.held import modules_in
from passes.graphs.numbers import TOLERANCE, distance, largest
from passes.graphs.operators import ACTIVATIONS, arguments, is_elementwise, op_name
from passes.graphs.record import undisturbed
from passes.graphs.shapes import fits_any, is_free
from passes.mlp.weights import site_rows
from passes.program.check import masked
from passes.program.compilation import Group
from runtime.base.rows import one_row, row_by_row

WIDTH = 0.5
WAYS = ("code", "code with groups", "graph")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MAPS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
_ACTIVATIONS = ACTIVATIONS | {"glu"}
_CUTS = frozenset({"cat", "split", "split_with_sizes", "chunk", "slice", "glu"})
_MOVES = frozenset("permute transpose t view reshape _unsafe_view squeeze unsqueeze flatten expand".split())  # noqa: SIM905


class NotFoundError(Exception):
    """A candidate of which no MLP came out; says why."""


@dataclass(frozen=True)
class Marks:
    """Weights given as inputs: which dimension of each is a symbol, and which are given as two halves."""

    dims: Mapping[str, int]
    halves: frozenset[str] = frozenset()

    def given(self, name: str, value: Tensor) -> Tensor:
        """The input for the whole weight."""
        return value.unflatten(0, (2, -1)) if name in self.halves else value

    def whole(self, name: str, value: Tensor) -> Tensor:
        """The whole weight from the input."""
        return value.flatten(0, 1) if name in self.halves else value

    def free(self, name: str) -> int:
        """Which dimension of the input is the symbol."""
        return 1 if name in self.halves else self.dims[name]


def candidates(graph: BlockGraph) -> Iterator[tuple[str, Marks]]:
    """Every W2 with what is marked for it."""

    def mixes(node: fx.Node) -> bool:
        return _weight(node, graph) is not None

    for end in filter(mixes, graph.module.graph.nodes):
        down = str(_weight(end, graph))
        behind = _reach([arguments(end)["input"]], mixes, lambda node: node.all_input_nodes)
        starts = [node for node in behind if mixes(node)]
        made: dict[str, int] = {}
        for node in behind:
            is_map = op_name(node) in _MAPS
            near = [arguments(node)["weight"], arguments(node)["bias"]] if is_map else node.all_input_nodes
            names = [str(one.target) for one in near if isinstance(one, fx.Node) and one.target in graph.weights]
            made |= {name: 0 for name in names if is_map or len(shape_of(graph, name)) == 1}
        if not starts or down in made or not any(op_name(node) in _ACTIVATIONS for node in behind):
            continue
        readers = _reach([user for start in starts for user in start.users], mixes, lambda node: list(node.users))
        dims = {**made, **{str(_weight(node, graph)): 1 for node in readers if mixes(node)}, down: 1}
        hidden = shape_of(graph, down)[1]
        yield (
            down,
            Marks(dims, frozenset(one for one in made if not dims[one] and shape_of(graph, one)[0] == 2 * hidden)),
        )


def _weight(node: fx.Node, graph: BlockGraph) -> str | None:
    """The weight of a map that mixes channels; None for anything else."""
    if op_name(node) not in _MAPS or arguments(node).get("groups", 1) != 1:
        return None
    name = str(arguments(node)["weight"].target)
    return name if name in graph.weights else None


def _reach(
    start: Sequence[fx.Node], ends: Callable[[fx.Node], bool], step: Callable[[fx.Node], Sequence[fx.Node]]
) -> set[fx.Node]:
    """What is met from `start`, by operators that keep channels apart, up to where it `ends`."""
    seen: set[fx.Node] = set()
    queue = list(start)
    while queue:
        node = queue.pop()
        apart = node.op == "placeholder" or node.target is operator.getitem or is_elementwise(node)
        if node not in seen and (apart or op_name(node) in _MAPS | _CUTS | _MOVES):
            seen.add(node)
            queue += () if ends(node) else step(node)
    return seen


def shape_of(graph: BlockGraph, weight: str) -> torch.Size:
    """The shape of a weight."""
    node = next(node for node in graph.module.graph.nodes if node.target == weight)
    return torch.Size(node.meta["val"].shape)


class OfWeights(nn.Module):
    """A block, by its code or its graph, as a function of the marked weights and of its inputs."""

    def __init__(self, group: Group, marks: Marks, way: str) -> None:
        super().__init__()
        self.graph, self.marks, self.way = group.graph, marks, way
        self.block, self.call = group.first.module, group.first.calls[-1]
        self.held = nn.ModuleList(modules_in(self.call.leaves))
        self.outputs = [output for output, _ in group.states.pairs]
        values = dict(zip(self.graph.weights, weight_values(self.graph, self.block), strict=True))
        self.weights = {name: values[name] for name in marks.dims}
        self.inputs: list[Any] = [self.call.leaves[leaf] for leaf in self.graph.leaves]
        if way == "graph":
            self.inputs = [as_real(value) for value in self.inputs]
            for name in values.keys() - marks.dims.keys():
                self.register_buffer(f"fixed_{name}", values[name])

    @property
    def limit(self) -> float:
        """How far the narrowed block may be off."""
        return TOLERANCE["model"][next(value.dtype for value in self.weights.values() if value.is_floating_point())]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """The block's states."""
        own = {name: self.marks.whole(name, value) for name, value in zip(self.weights, tensors, strict=False)}
        inputs = tensors[len(own) :]
        if self.way == "graph":
            every = [own[name] if name in own else getattr(self, f"fixed_{name}") for name in self.graph.weights]
            return list(self.graph.module(*every, *inputs))
        leaves = list(self.call.leaves)
        for at, value in zip(self.graph.leaves, inputs, strict=True):
            leaves[at] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.call.spec)
        weights = {self.graph.weights[name]: value for name, value in own.items()}
        with self._grouped(weights) if self.way == "code with groups" else nullcontext():
            results = pytree.tree_leaves(functional_call(self.block, weights, args, kwargs))
        return [results[output] for output in self.outputs]

    def depthwise(self) -> dict[str, nn.Module]:
        """The depthwise convolutions whose weights are marked, by these weights' names in the block."""
        owners = {
            name: self.block.get_submodule(name.rpartition(".")[0])
            for name in map(self.graph.weights.get, self.weights)
        }
        return {
            name: one
            for name, one in owners.items()
            if name.endswith(".weight") and isinstance(one, _CONVS) and one.groups > 1
        }

    @contextmanager
    def _grouped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        kept = {name: module.groups for name, module in self.depthwise().items()}
        try:
            for name, module in self.depthwise().items():
                module.groups = weights[name].shape[0]
            yield
        finally:
            for name, groups in kept.items():
                self.block.get_submodule(name.removesuffix(".weight")).groups = groups

    def export(self) -> tuple[nn.Module, dict[str, int | torch.SymInt]]:
        """One graph for all sizes that stay symbols, and the size of every mark in it."""
        rows = self.graph.row_dims if self.way == "graph" else None
        inputs = self.inputs if rows is None else one_row(self.inputs, rows)
        example = [self.marks.given(name, value).clone() for name, value in self.weights.items()]
        moving = [{self.marks.free(name): Dim.AUTO} for name in self.weights]
        nodes = {node.name: node for node in self.graph.module.graph.nodes}
        for name in self.graph.inputs:
            sizes = enumerate(nodes[name].meta["val"].shape)
            moving.append({dim: Dim.AUTO for dim, size in sizes if is_free(size)})
        with undisturbed(self):
            program = exported(self, [*example, *(value.clone() for value in inputs)], moving)
        nodes = {node.name: node for node in program.graph.nodes}
        given = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs]
        found = {name: value.shape[self.marks.free(name)] for name, value in zip(self.weights, given, strict=False)}
        return program.module(), found

    def difference(self, module: nn.Module, sites: Sequence[MlpSite]) -> float:
        """Distance of the narrowed graph from the masked block."""
        cut = [self._cut(name, value, sites) for name, value in self.weights.items()]
        args, kwargs = pytree.tree_unflatten(list(self.call.leaves), self.call.spec)
        with undisturbed(self), masked(self.block, sites, WIDTH):
            expected = pytree.tree_leaves(self.block(*args, **kwargs))
            rows = self.graph.row_dims if self.way == "graph" else None
            found = (
                module(*cut, *self.inputs)
                if rows is None
                else row_by_row(lambda row: module(*cut, *row), self.inputs, rows, self.graph.states)
            )
        return largest(distance(one, expected[at]) for one, at in zip(found, self.outputs, strict=True))

    def _cut(self, name: str, value: Tensor, sites: Sequence[MlpSite]) -> Tensor:
        dim = self.marks.dims[name]
        keep = torch.ones(value.shape[dim], dtype=torch.bool)
        for slot, kept in ((slot, site_rows(site.hidden, WIDTH)) for site in sites for slot in site.slots):
            if slot.weight == name:
                keep[slot.start + kept : slot.start + slot.size] = False
        return self.marks.given(name, value.index_select(dim, keep.nonzero()[:, 0]))


def read(graph: BlockGraph, end: str, marks: Marks, sizes: Mapping[str, int | torch.SymInt]) -> list[MlpSite]:
    """The MLP that ends in W2: with the channels that are joined to the hidden ones before them, and behind them."""
    size = sizes[end]
    if not is_free(size):
        raise NotFoundError("the hidden size is fixed by the code")
    if not fits_any(size):
        raise NotFoundError("the code does something else at other hidden sizes")
    apart = {name: size.node.expr - other.node.expr for name, other in sizes.items() if is_free(other)}  # type: ignore
    tied = {name: int(offset) for name, offset in apart.items() if offset.is_Integer}
    joined = max(tied.values())
    starts = [name for name in tied if not marks.dims[name] and tied[name] == joined]
    if not any(len(shape_of(graph, name)) > 1 for name in starts):
        told = dict.fromkeys(str(sizes[name]) for name in sizes if not marks.dims[name])
        raise NotFoundError(f"{size} channels are contracted, maps make {', '.join(told)}")
    hidden = shape_of(graph, end)[1] - joined
    found = []
    for before in (True, False) if joined else (True,):
        slots: list[Slot] = []
        for name in tied:
            if marks.dims[name]:
                slots.append(Slot(name, 1, shape_of(graph, name)[1] - hidden if before else 0, hidden))
            elif name in starts:
                slots += [Slot(name, 0, half * hidden, hidden) for half in range(1 + (name in marks.halves))]
        ends = tuple(slot for slot in slots if slot.dim)
        found.append(MlpSite(hidden, tuple(slots), ends, {slot.weight: graph.weights[slot.weight] for slot in slots}))
    return found


def try_candidate(group: Group, end: str, marks: Marks) -> tuple[MlpSite | None, dict[str, Any]]:
    """The MLP that ends in `end`, if its narrowed graph gives what the masked block gives; and what was seen."""
    row: dict[str, Any] = {"end": group.graph.weights[end], "reasons": {}, "exports": 0}
    for way in WAYS:
        try:
            made = OfWeights(group, marks, way)
            if way == "code with groups" and not made.depthwise():
                continue
            row["exports"] += 1
            module, sizes = made.export()
            offs = [(made.difference(module, [site]), site) for site in read(group.graph, end, marks, sizes)]
        except NotFoundError as error:
            row["reasons"][way] = str(error)
        except Exception as error:
            row["reasons"][way] = f"{type(error).__name__}: {why(error)}"[:300]
        else:
            off, site = min(offs, key=lambda pair: (pair[0] != pair[0], pair[0]))
            row |= {"way": way, "difference": off, "equal": off <= made.limit}
            return (site if row["equal"] else None), row
    return None, row


def together(group: Group, sites: Sequence[MlpSite], way: str) -> dict[str, Any]:
    """All MLPs at once: one graph for every width, if it is."""
    slots = [slot for site in sites for slot in site.slots]
    halves = frozenset(slot.weight for slot in slots if not slot.dim and slot.start)
    try:
        made = OfWeights(group, Marks({slot.weight: slot.dim for slot in slots}, halves), way)
        module, sizes = made.export()
        fixed = [group.graph.weights[name] for name, size in sizes.items() if not fits_any(size)]
        if fixed:
            return {"equal": False, "reason": f"fixed: {', '.join(fixed)}"}
        off = made.difference(module, sites)
    except Exception as error:
        return {"equal": False, "reason": f"{type(error).__name__}: {why(error)}"[:300]}
    return {"equal": off <= made.limit, "difference": off}
