"""Turn each block call of a model into a guard, and export what remains as the glue graph.

    y = block_i(leaves)          ->      states = guard(inputs(leaves), state positions, i)
                                         y = the block's own output structure, refilled with states

`inputs` picks the tensor leaves that the block's plan takes, in plan order; outputs that are not
states are constants of the call (None, in every model seen). The guard is opaque to torch.export,
so the glue holds the model's embeddings, norms and projections and one node per block. The node says in which of its
forms (runtime.bundle.spec.Form) the block is called there; a glue in which values set the sizes at the guards, and the
model's own Python as glue, leave that to the shapes: ANY.

Guards are put into a copy of the model by passes.glue.calling.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from passes.blocks.complex_to_real import as_real
from passes.blocks.quiet_export import exported, stopping_quietly, why
from passes.blocks.reading import Reading
from passes.graphs.glue_graph import GlueGraph, tensor_arguments
from passes.graphs.graph import Report, Run
from passes.graphs.shapes import fits_any
from runtime.base.errors import EditError
from runtime.base.guard import ANY, guard
from runtime.bundle.operators import refused_in
from runtime.face.arguments import all_exactly, flatten


class GuardError(EditError):
    """A glue graph could not be made; the message says what stood in the way."""


def guard_glue(
    guarded: nn.Module,
    given: Run,
    doubled: Run,
    fits: Callable[[GlueGraph, Run], bool] = lambda glue, run: True,
    name: str = "0",
) -> tuple[GlueGraph, Run, Report]:
    """Export the glue of a guarded model under `name`, and say at the shapes of which run.

    The two runs are of one bucket: dimensions that differ between them are left dynamic. Where the export
    cannot keep them so, where the graph pins the batch nevertheless (made from `doubled`, it does not `fits` the
    given run), and where arguments list something for each sample, the glue fits the given batch only.

    Raises:
        GuardError: torch.export cannot follow the model's own forward.
    """
    (tensors, constants), (others, as_given) = (flatten(run.kwargs) for run in (doubled, given))
    if tensors.keys() == others.keys() and all_exactly(constants) == all_exactly(as_given):
        with suppress(GuardError):
            glue, report = _export_glue(guarded, doubled, moving_dims(doubled, given), name)
            if glue.batch_dims and fits(glue, given):
                return glue, doubled, report
    glue, report = _export_glue(guarded, given, {}, name)
    return glue, given, report


def moving_dims(run: Run, other: Run) -> dict[str, list[int]]:
    """Dimensions in which the tensor arguments of two runs differ, by the names that both have."""
    sizes = dict(zip(*tensor_arguments(other.kwargs), strict=True))
    return {
        name: [d for d in range(value.dim()) if value.shape[d] != sizes[name].shape[d]]
        for name, value in zip(*tensor_arguments(run.kwargs), strict=True)
        if name in sizes and value.dim() == sizes[name].dim()
    }


def _export_glue(
    guarded: nn.Module, run: Run, moving: Mapping[str, Sequence[int]], name: str
) -> tuple[GlueGraph, Report]:
    names, values = tensor_arguments(run.kwargs)
    free = [dict.fromkeys(moving.get(name, ()), Dim.AUTO) or None for name in names]
    returned: list[tuple[str, ...]] = []
    wrapper = _Positional(guarded, run.kwargs, returned.append)
    try:
        with torch.no_grad():
            program = exported(wrapper, values, free)
    except Exception as error:
        raise GuardError(f"the glue of {type(guarded).__name__} does not export: {why(error)}") from error
    module, weights = _functional(program, name)
    refused = refused_in(module.graph)
    if refused is not None:
        raise GuardError(f"in the glue of {type(guarded).__name__} {refused}, which no bundle may hold")
    batch_dims = _kept_free(module, names, free, len(weights))
    done = f"{_count_guards(module)} guards in {len(module.graph.nodes)} nodes"
    done += f", batch free in {len(batch_dims)} inputs" if batch_dims else f", batch fixed at {run.batch}"
    nodes = module.graph.find_nodes(op="placeholder")[len(weights) :]
    sized, loose = _sized_by(module, dict(zip(nodes, names, strict=True)))
    done += f", sized by the values of {', '.join(sized)}" if sized else ""
    return GlueGraph(module, weights, tuple(names), batch_dims, returned[0], sized, loose), Report("guards", (done,))


_PICKS = (torch.ops.aten.index.Tensor, torch.ops.aten.masked_select.default)
"""Operators whose second argument alone says how much they give."""


def _sized_by(
    module: fx.GraphModule, inputs: Mapping[fx.Node, str]
) -> tuple[tuple[str, ...], frozenset[tuple[int, int, int]]]:
    """The `inputs` whose values set sizes at guards, and which; those guards are told to go by the shapes."""
    made: dict[fx.Node, set[str]] = {}
    sized: dict[fx.Node, set[str]] = {}
    found: set[str] = set()
    loose: set[tuple[int, int, int]] = set()
    for node in module.graph.nodes:
        sources = node.all_input_nodes
        made[node] = {inputs[node]} if node in inputs else set().union(*(made[source] for source in sources))
        sized[node] = set().union(*(sized[source] for source in sources))
        if _unbacked(node) - set().union(*map(_unbacked, sources)) and not any(map(_is_size, sources)):
            readers = _nodes(node.args[1]) if node.target in _PICKS else sources
            sized[node].update(*(made[source] for source in readers))
        if node.target is guard and any(map(_unbacked, _nodes(node.args[0]))):
            block = node.args[2]
            node.args = (*node.args[:3], ANY)
            found |= sized[node]
            for k, tensor in enumerate(_nodes(node.args[0])):
                shape = tensor.meta["val"].shape
                loose |= {(block, k, dim) for dim, size in enumerate(shape) if free_unbacked_symbols(size)}
    return tuple(name for name in inputs.values() if name in found), frozenset(loose)


def _nodes(argument: Any) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, fx.Node)]


def _unbacked(node: fx.Node) -> set[Any]:
    """Symbols of sizes in what the node gives that come from numbers in a tensor."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return set().union(*(free_unbacked_symbols(leaf) for leaf in leaves if isinstance(leaf, (Tensor, torch.SymInt))))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _output_names(outputs: Any, wraps: bool) -> tuple[str, ...]:
    """None for a bare tensor, positions for a plain tuple that nothing wraps, else those of diffusers.

    Where one of several outputs is a list, its tensors are ``sample.0``, ``sample.1``, ...
    """
    if isinstance(outputs, Tensor):
        return ()
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs
    held = [part for part in parts if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(part))]
    named = [f"output_{k}" for k in range(len(held))] if len(held) > 1 else ["sample"]
    if type(outputs) is tuple and not wraps:
        named = [str(k) for k in range(len(held))]
    return tuple(flatten(dict(zip(named, held, strict=True)))[0])


def _wraps(model: nn.Module) -> bool:
    """Whether the model gives an object with names, unless it is asked not to."""
    return "return_dict" in inspect.signature(model.forward).parameters


class _Positional(nn.Module):
    """Takes tensor arguments by position, gives the model's tensors as a flat tuple, and notes their names."""

    def __init__(self, model: nn.Module, kwargs: Mapping[str, object], note: Callable[[tuple[str, ...]], None]) -> None:
        super().__init__()
        self.model, self.note = model, note
        kwargs = dict(kwargs)
        if _wraps(model):
            kwargs["return_dict"] = False
        self.leaves, self.spec = pytree.tree_flatten(kwargs)
        self.leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in self.leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        leaves = [next(rest) if leaf is None else leaf[0] for leaf in self.leaves]
        with stopping_quietly(), Reading():  # so that numbers made of shapes and plain values are read as they are
            outputs = self.model(**pytree.tree_unflatten(leaves, self.spec))
        self.note(_output_names(outputs, _wraps(self.model)))
        return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


def _functional(program: torch.export.ExportedProgram, glue: str) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The program's graph with its used weights as leading placeholders, and their values by name."""
    specs = {s.arg.name: s for s in program.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT}
    weights: dict[str, Tensor] = {}
    module = program.graph_module
    for node in module.graph.find_nodes(op="placeholder"):
        if node.name not in specs:
            continue
        target = specs[node.name].target or ""
        if not node.users:
            module.graph.erase_node(node)
        elif specs[node.name].kind is InputKind.CONSTANT_TENSOR:
            weights[f"glue.{glue}.{target}"] = program.constants[target]
        else:
            held = program.state_dict if target in program.state_dict else program.constants
            weights[target.removeprefix("model.")] = held[target].detach()
    for node, name in zip(module.graph.find_nodes(op="placeholder"), list(weights), strict=False):
        if weights[name].is_complex() and weights[name].dtype is not torch.complex64:
            weights[name] = as_real(weights[name])
            _take_pairs(module.graph, node)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module, weights


def _take_pairs(graph: fx.Graph, weight: fx.Node) -> None:
    """Take a complex weight as pairs of real numbers: of complex dtypes, files of weights hold complex64 alone."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        twin = graph.call_function(torch.ops.aten.view_as_complex.default, (weight,))
    twin.meta["val"], weight.meta["val"] = weight.meta["val"], torch.view_as_real(weight.meta["val"])
    weight.replace_all_uses_with(twin, delete_user_cb=lambda user: user is not twin)


def _kept_free(module: fx.GraphModule, names: Sequence[str], free: Sequence[dict | None], skip: int) -> dict[str, int]:
    kept: dict[str, int] = {}
    nodes = module.graph.find_nodes(op="placeholder")[skip:]
    for node, name, dims in zip(nodes, names, free, strict=True):
        for dim in dims or ():
            if not fits_any(node.meta["val"].shape[dim]):
                return {}
            kept[name] = dim
    return kept


def _count_guards(module: fx.GraphModule) -> int:
    return len(module.graph.find_nodes(op="call_function", target=guard))
