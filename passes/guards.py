"""Turn each block call of a model into a guard, and export what remains as the glue graph.

    y = block_i(leaves)          ->      states = guard(inputs(leaves), state positions, i)
                                         y = the block's own output structure, refilled with states

`inputs` picks the tensor leaves that the block's plan takes, in plan order; outputs that are not
states are constants of the call (None, in every model seen). The guard is opaque to torch.export,
so the glue holds the model's embeddings, norms and projections and one node per block.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from passes.graph import BlockGraph, Call, Discovery, Report, Run, States
from passes.real import as_real
from runtime.arguments import flatten
from runtime.errors import EditError
from runtime.guard import guard


class GuardError(EditError):
    """A glue graph could not be made; the message says what stood in the way."""


@dataclass(frozen=True)
class GlueGraph:
    """The model around its guards: ``module(*weights, *inputs) -> tuple(outputs)``.

    `weights` are the leading placeholders' tensors by qualified name in the model (constants that
    belong to no module under ``glue.<bucket>.<name>``); `inputs` are the keywords (dotted where the
    argument is a container) of the tensor arguments. `batch_dims` tells which
    inputs keep a free batch dimension; empty when the glue fits one batch size only. `outputs` names
    what the model gives; empty where it gives one bare tensor.
    """

    module: fx.GraphModule
    weights: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    batch_dims: Mapping[str, int]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Guard:
    """Answers the calls of block `index` through the guard operator; takes and gives what the block does."""

    index: int
    call: Call
    states: States
    graph: BlockGraph

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Called with the block's arguments; gives the block's output structure."""
        leaves = pytree.tree_leaves((args, kwargs))
        inputs = [as_real(leaves[position]) for position in self.graph.leaves]
        outputs = list(self.call.outputs)
        for (position, _), state in zip(self.states.pairs, guard(inputs, self.graph.states, self.index), strict=True):
            outputs[position] = state
        return pytree.tree_unflatten(outputs, self.call.output_spec)


def guarded_copy(discovery: Discovery, states: Sequence[States], graphs: Sequence[BlockGraph]) -> nn.Module:
    """The model with the forward of every discovered block replaced by its guard.

    Shares all parameters and buffers and leaves the model itself alone. A guarded block keeps its
    children, since a model's forward may reach into them.
    """
    model = discovery.model
    known: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for index, (site, state, graph) in enumerate(zip(discovery.blocks, states, graphs, strict=True)):
        block = copy.copy(site.module)
        block.forward = Guard(index, site.calls[0], state, graph)
        known[id(site.module)] = block
    return copy.deepcopy(model, known)


def guard_glue(guarded: nn.Module, run: Run, other: Run) -> tuple[GlueGraph, Report]:
    """Export the glue of a guarded model at the shapes of `run`.

    `other` is a run of the same bucket at another batch size: dimensions that differ between the
    two are left dynamic where the export can keep them so, and the report says where it could not.

    Raises:
        GuardError: torch.export cannot follow the model's own forward.
    """
    names, values = tensor_arguments(run.kwargs)
    sizes = dict(zip(*tensor_arguments(other.kwargs), strict=True))
    free = [
        {d: Dim.AUTO for d in range(value.dim()) if value.shape[d] != sizes[name].shape[d]} or None
        for name, value in zip(names, values, strict=True)
    ]
    returned: list[type] = []
    wrapper = _Positional(guarded, run.kwargs, returned.append)
    try:
        with torch.no_grad():
            program = torch.export.export(wrapper, tuple(values), dynamic_shapes=(tuple(free),), strict=False)
            program = program.run_decompositions({})
    except Exception as error:
        raise GuardError(f"the glue of {type(guarded).__name__} does not export: {_first_line(error)}") from error
    module, weights = _functional(program, run.bucket)
    batch_dims = _kept_free(module, names, free, len(weights))
    done = f"{_count_guards(module)} guards in {len(module.graph.nodes)} nodes"
    done += f", batch free in {len(batch_dims)} inputs" if batch_dims else f", batch fixed at {run.batch}"
    outputs = len(_outputs(module))
    found = (
        ()
        if issubclass(returned[0], Tensor)
        else ("sample",)
        if outputs == 1
        else tuple(f"output_{k}" for k in range(outputs))
    )
    glue = GlueGraph(module, weights, tuple(names), batch_dims, found)
    return glue, Report("guards", (done,))


def tensor_arguments(kwargs: Mapping[str, object]) -> tuple[list[str], list[Tensor]]:
    """Names (``key`` or ``key.0.sub``) and values of the tensors among a forward's keyword arguments."""
    tensors, _ = flatten(kwargs)
    return list(tensors), list(tensors.values())


class _Positional(nn.Module):
    """Takes tensor arguments by position, gives the model's tensors as a flat tuple, and notes what type held them."""

    def __init__(self, model: nn.Module, kwargs: Mapping[str, object], note: Callable[[type], None]) -> None:
        super().__init__()
        self.model, self.note = model, note
        kwargs = dict(kwargs)
        if "return_dict" in inspect.signature(model.forward).parameters:
            kwargs["return_dict"] = False
        self.leaves, self.spec = pytree.tree_flatten(kwargs)
        self.leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in self.leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        leaves = [next(rest) if leaf is None else leaf[0] for leaf in self.leaves]
        outputs = self.model(**pytree.tree_unflatten(leaves, self.spec))
        self.note(type(outputs))
        return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


def _functional(program: torch.export.ExportedProgram, bucket: int) -> tuple[fx.GraphModule, dict[str, Tensor]]:
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
            weights[f"glue.{bucket}.{target}"] = program.constants[target]
        else:
            held = program.state_dict if target in program.state_dict else program.constants
            weights[target.removeprefix("model.")] = held[target].detach()
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module, weights


def _kept_free(module: fx.GraphModule, names: Sequence[str], free: Sequence[dict | None], skip: int) -> dict[str, int]:
    kept: dict[str, int] = {}
    nodes = module.graph.find_nodes(op="placeholder")[skip:]
    for node, name, dims in zip(nodes, names, free, strict=True):
        for dim in dims or ():
            if not isinstance(node.meta["val"].shape[dim], torch.SymInt):
                return {}
            kept[name] = dim
    return kept


def _outputs(module: fx.GraphModule) -> tuple[fx.Node, ...]:
    return tuple(module.graph.output_node().args[0])  # type: ignore[arg-type]


def _count_guards(module: fx.GraphModule) -> int:
    return len(module.graph.find_nodes(op="call_function", target=guard))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
