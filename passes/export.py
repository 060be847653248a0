"""A block as a graph of tensors: ``graph(*weights, *inputs) -> tuple(states)``.

The call B(args, kwargs) is flattened by pytree to leaves l_1 .. l_n. Tensor leaves stay inputs; every
other leaf, equal in all runs, is baked in. Of the outputs only the states remain. A dimension of an
input is symbolic exactly where it carries the batch or was seen with two sizes; the example has a
batch of two or more, so that no size-one rule is frozen in. The graph is made plain (passes.plain) and
then run against every recorded call and against a single row of the last one: where the block's code
pins a dimension that varies, that is where it shows. Where it pins the batch alone (a loop over rows), the
graph of one row does all, since rows are independent, f(X)[r] = f(X[r:r+1]); where the code routes tokens to experts,
the graph of all experts (passes.experts); else the export is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from enum import Enum

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from passes.adapt import lone
from passes.constant import known_counts
from passes.experts import dense_experts, find_experts
from passes.flex import dense_attention
from passes.graph import BlockGraph, BlockSite, Call, Report, Run, States
from passes.guards import fits_any
from passes.plain import CONSTANT, PlainError, plain
from passes.record import stopping_quietly, undisturbed
from passes.weightless import hollow
from runtime.base.errors import EditError
from runtime.base.rows import one_row

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_BAKEABLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum, np.generic)


class ExportError(EditError):
    """A block that has no faithful graph; the message says why."""


def export_block(
    site: BlockSite, states: States, runs: Sequence[Run], free: Mapping[int, Collection[int]] | None = None
) -> tuple[BlockGraph, Report]:
    """The graph of `site`, for any batch and for every size that differed between `runs`.

    Dimensions of leaves in `free`, which were seen with other sizes elsewhere, are left free where the code lets them.

    ``graph.module.meta["constants"]`` holds the tensors that are neither parameters nor buffers, by
    the names they have in ``graph.weights`` (they start with ``constant.``).

    Raises ExportError where a tensor that the block returns is no state, where it takes a value that
    varies and is no tensor, cannot be traced, pins a dimension that varies, writes to its inputs or
    buffers, or where the graph does not give the recorded outputs (to 1e-5 of their largest element in
    float32).
    """
    outputs = [at for at, leaf in enumerate(site.calls[0].outputs) if isinstance(leaf, Tensor)]
    if not outputs or [output for output, _ in states.pairs] != outputs:
        raise ExportError(f"{site.name}: not every tensor it returns is known to continue an input")
    if any(at not in site.batch_dims for _, at in states.pairs):
        raise ExportError(f"{site.name}: a state does not carry the batch")
    _check_constants(site)
    tensors = [at for at, leaf in enumerate(site.calls[0].leaves) if isinstance(leaf, Tensor)]
    moving = {at: tuple(sorted({*_moving_dims(site, at), *(free or {}).get(at, ())})) for at in tensors}
    example = _example(site, runs)
    try:
        graph, flex = _faithful(site, states, example, moving)
    except ExportError as error:
        if free:
            return export_block(site, states, runs)
        graph, flex = _without_routing(site, states, example, moving, error)
    operators = sum(node.op == "call_function" for node in graph.module.graph.nodes)
    done = f"{site.name}: {operators} operators, {len(graph.weights)} weights, inputs {', '.join(graph.inputs)}"
    done += "" if graph.row_dims is None else ", one row per call, since its code pins the batch"
    done += f", all experts of {', '.join(graph.experts)} on every token" if graph.experts else ""
    return graph, Report("export", (done, *(f"{site.name}: {line}" for line in flex)))


def _faithful(
    site: BlockSite, states: States, call: Call, moving: Mapping[int, tuple[int, ...]]
) -> tuple[BlockGraph, tuple[str, ...]]:
    """The validated graph of `call`, and what was done to its attention."""
    graph, flex = _graph(site, states, call, moving)
    try:
        _check_batch(graph, site)
        validate(graph, site)
    except ExportError as error:
        return _row_graph(site, states, call, moving, error)
    return graph, flex


def _check_batch(graph: BlockGraph, site: BlockSite) -> None:
    """ExportError where tracing assumed something of the batch that other batches do not meet."""
    nodes = {node.name: node for node in graph.module.graph.nodes if node.op == "placeholder"}
    for name, leaf in zip(graph.inputs, graph.leaves, strict=True):
        dim = site.batch_dims.get(leaf)
        size = None if dim is None else nodes[name].meta["val"].shape[dim]
        if isinstance(size, torch.SymInt) and not fits_any(size):
            raise ExportError(f"{site.name}: its code does something else at other batches than those it was run with")


def _without_routing(
    site: BlockSite, states: States, call: Call, moving: Mapping[int, tuple[int, ...]], error: ExportError
) -> tuple[BlockGraph, tuple[str, ...]]:
    """The validated graph of `call` with all experts on every token; where that is none either, `error`."""
    experts = find_experts(site.module)
    if not experts:
        raise error
    try:
        with dense_experts(experts):
            graph, flex = _faithful(site, states, call, moving)
    except ExportError as other:
        told = f"{error} (nor is there a graph with all experts of {', '.join(experts)} on every token: {other})"
        raise ExportError(told) from error
    return replace(graph, experts=tuple(experts)), flex


def _graph(
    site: BlockSite, states: States, call: Call, moving: Mapping[int, tuple[int, ...]]
) -> tuple[BlockGraph, tuple[str, ...]]:
    """The graph of `call`, not validated, and what was done to what it read from tensors and to its attention."""
    program = _trace(site, states, call, moving)
    try:
        counts = known_counts(program.graph_module)
    except Exception as error:
        raise ExportError(f"{site.name}: the counts it reads from tensors do not fit: {error}") from error
    flex = dense_attention(program.graph_module)
    if flex.refused:
        raise ExportError(f"{site.name}: {flex.refused[0].reason}")
    try:
        module, weights = plain(program, "block.", leaf_names(site))
    except PlainError as error:
        raise ExportError(f"{site.name}: {error}") from error
    inputs = tuple(node.name for node in module.graph.nodes if node.op == "placeholder" and node.name not in weights)
    positions = tuple(list(moving).index(at) for _, at in states.pairs)
    return BlockGraph(module, weights, inputs, tuple(moving), positions), (*counts, *flex.done)


def _row_graph(
    site: BlockSite, states: States, call: Call, moving: Mapping[int, tuple[int, ...]], error: ExportError
) -> tuple[BlockGraph, tuple[str, ...]]:
    """The validated graph of one row of `call`; where there is none, `error`: the batch was not what its code pins."""
    free = {at: tuple(dim for dim in dims if dim != site.batch_dims.get(at)) for at, dims in moving.items()}
    try:
        graph, flex = _graph(site, states, _first_row(site, states, call), free)
        graph = replace(graph, row_dims=tuple(site.batch_dims.get(at) for at in moving))
        validate(graph, site)
    except ExportError as other:
        raise ExportError(f"{error} (nor is there a graph of a row alone: {other})") from error
    return graph, flex


def weight_values(graph: BlockGraph, module: nn.Module) -> list[Tensor]:
    """What `module` passes for ``graph.weights``, detached; it is the exported block or one of its group.

    A complex tensor is given as pairs where the graph takes pairs (see passes.real).
    """
    constants = graph.module.meta["constants"]
    values = [
        constants[name] if name.startswith(CONSTANT) else _attribute(module, name).detach()
        for name in graph.weights.values()
    ]
    return _as_taken(graph, list(graph.weights), values)


def validate(graph: BlockGraph, site: BlockSite) -> None:
    """Run `graph` with the weights of `site` on each recorded call, and on one row of the last.

    `site` is the exported block or one of its group. Raises ExportError on the first mismatch.
    """
    weights = weight_values(graph, site.module)
    with torch.no_grad():
        for index, call in enumerate(site.calls):
            _compare(site, f"run {index}", graph, weights, call)
        states = States(tuple((k, graph.leaves[index]) for k, index in enumerate(graph.states)))
        _compare(site, "a single row", graph, weights, _first_row(site, states, site.calls[-1]))


def leaf_names(site: BlockSite) -> list[str]:
    """A name for each tensor leaf of the block's call, from its place among the arguments."""
    call = site.calls[0]
    parameters = list(inspect.signature(type(site.module).forward).parameters)[1:]
    tree = pytree.tree_unflatten(call.leaves, call.spec)
    names = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            whole, first, *rest = (_key(key) for key in path)
            if whole == "0" and int(first) < len(parameters):
                first = parameters[int(first)]
            names.append("_".join([first, *rest]))
    return names


def _key(key: object) -> str:
    return str(next(getattr(key, field) for field in ("idx", "key", "name") if hasattr(key, field)))


def _check_constants(site: BlockSite) -> None:
    """Every leaf that is no tensor must be a plain value, and the same in all runs."""
    for at, leaf in enumerate(site.calls[0].leaves):
        if isinstance(leaf, Tensor):
            continue
        if not isinstance(leaf, _BAKEABLE):
            raise ExportError(f"{site.name}: argument leaf {at} is a {type(leaf).__name__}")
        if any(call.leaves[at] != leaf for call in site.calls):
            raise ExportError(f"{site.name}: argument leaf {at} ({leaf!r}) is no tensor and differs between runs")


def _moving_dims(site: BlockSite, at: int) -> tuple[int, ...]:
    """Dimensions of leaf `at` that differ between runs (the batch always does)."""
    shapes = [leaf.shape for leaf in (call.leaves[at] for call in site.calls) if isinstance(leaf, Tensor)]
    if len({len(shape) for shape in shapes}) != 1:
        raise ExportError(f"{site.name}: argument leaf {at} has another number of dimensions in another run")
    return tuple(dim for dim in range(len(shapes[0])) if len({shape[dim] for shape in shapes}) > 1)


def _example(site: BlockSite, runs: Sequence[Run]) -> Call:
    """The largest call with a batch of two or more; of a model that takes one sample, the largest."""
    calls = [call for call, run in zip(site.calls, runs, strict=True) if run.batch >= 2 or lone(runs)]
    return max(calls, key=lambda call: sum(leaf.numel() for leaf in call.leaves if isinstance(leaf, Tensor)))


class _Flat(nn.Module):
    """The block as a function of its tensor leaves."""

    def __init__(self, block: nn.Module, call: Call, tensors: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        self.block = block
        self._call = Call(
            tuple(None if at in tensors else leaf for at, leaf in enumerate(call.leaves)), call.spec, (), call.spec
        )
        self._tensors = tuple(tensors)
        self._outputs = tuple(outputs)

    def forward(self, *inputs: Tensor) -> tuple[object, ...]:
        leaves = list(self._call.leaves)
        for at, value in zip(self._tensors, inputs, strict=True):
            leaves[at] = value
        args, kwargs = pytree.tree_unflatten(leaves, self._call.spec)
        with stopping_quietly():
            results = pytree.tree_leaves(self.block(*args, **kwargs))
        return tuple(results[at] for at in self._outputs)


def _trace(site: BlockSite, states: States, call: Call, moving: Mapping[int, tuple[int, ...]]) -> ExportedProgram:
    flat = _Flat(site.module, call, list(moving), [output for output, _ in states.pairs])
    example = tuple(leaf.clone() for leaf in (call.leaves[at] for at in moving) if isinstance(leaf, Tensor))
    dynamic = (tuple(dict.fromkeys(dims, Dim.AUTO) for dims in moving.values()),)
    try:
        with undisturbed(flat):
            program = torch.export.export(flat, example, dynamic_shapes=dynamic, strict=False)
            return program.run_decompositions({})
    except Exception as error:
        raise ExportError(
            f"{site.name}: torch.export cannot follow its code: {type(error).__name__}: {error}"
        ) from error


def _first_row(site: BlockSite, states: States, call: Call) -> Call:
    """The call with the first row of the batch alone; outputs that are no states are dropped."""
    leaves = one_row(call.leaves, [site.batch_dims.get(at) for at in range(len(call.leaves))])  # type: ignore[arg-type]
    outputs = one_row(_states(call), [site.batch_dims[at] for _, at in states.pairs])
    return Call(tuple(leaves), call.spec, tuple(outputs), call.output_spec)


def _states(call: Call) -> list[Tensor]:
    return [output for output in call.outputs if isinstance(output, Tensor)]


def _compare(site: BlockSite, what: str, graph: BlockGraph, weights: Sequence[Tensor], call: Call) -> None:
    inputs = [leaf for leaf in (call.leaves[at] for at in graph.leaves) if isinstance(leaf, Tensor)]
    try:
        states = graph.run(graph.module, weights, _as_taken(graph, graph.inputs, inputs))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ExportError(f"{site.name}: the graph fails on {what}: {error}") from error
    for index, (given, wanted) in enumerate(zip(states, _states(call), strict=True)):
        if given.shape != wanted.shape or given.dtype != wanted.dtype:
            raise ExportError(f"{site.name}: state {index} of the graph has another shape or dtype on {what}")
        if hollow(given):
            continue
        distance = float((given - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny))
        if not distance <= _TOLERANCE[wanted.dtype]:
            raise ExportError(f"{site.name}: state {index} of the graph is off by {distance:.1e} on {what}")


def _as_taken(graph: BlockGraph, names: Sequence[str], values: Sequence[Tensor]) -> list[Tensor]:
    """`values` with complex ones as pairs where the placeholder of that name is real."""
    nodes = {node.name: node for node in graph.module.graph.nodes if node.op == "placeholder"}
    return [
        torch.view_as_real(value) if value.is_complex() and not nodes[name].meta["val"].is_complex() else value
        for name, value in zip(names, values, strict=True)
    ]


def _attribute(module: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)
