"""A block as a graph of tensors: ``graph(*weights, *inputs) -> tuple(states)``.

The call B(args, kwargs) is flattened by pytree to leaves l_1 .. l_n. Tensor leaves stay inputs; every
other leaf, equal in all runs, is baked in. Of the outputs only the states remain. A dimension of an
input is symbolic exactly where it carries the batch or was seen with two sizes; the example has a
batch of two or more, so that no size-one rule is frozen in. The graph is made plain (passes.blocks.functional) and
then run against every recorded call and against a single row of the last one: where the block's code
pins a dimension that varies, that is where it shows. Where it pins the batch alone (a loop over rows), the
graph of one row does all, since rows are independent, f(X)[r] = f(X[r:r+1]); where the code routes tokens to experts,
the graph of all experts (passes.blocks.experts); else the export is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from passes.blocks.experts import dense_experts, find_experts
from passes.blocks.flex_attention import dense_attention
from passes.blocks.fold_counts import known_counts
from passes.blocks.functional import CONSTANT, PlainError, plain
from passes.blocks.tracing import ExportError, ReadError, check_constants, is_known, trace
from passes.graphs.graph import BlockGraph, BlockSite, Call, Report, Run, States
from passes.graphs.held import held_by, modules_in, same_held
from passes.graphs.naming import argument_names, spoken
from passes.graphs.numbers import TOLERANCE, distance
from passes.graphs.shapes import fits_any
from passes.graphs.weightless import hollow
from passes.observe.adapt import lone
from passes.observe.settled import Settled
from runtime.base.rows import one_row


def export_block(
    site: BlockSite,
    states: States,
    runs: Sequence[Run],
    free: Mapping[int, Collection[int]] | None = None,
    settled: Callable[[], Settled] = Settled,
) -> tuple[BlockGraph, Report]:
    """The graph of `site`, for any batch and for every size that differed between `runs`.

    Dimensions of leaves in `free`, which were seen with other sizes elsewhere, are left free where the code lets them.
    `settled` gives the leaves whose numbers are the same in all calls of a form (passes.observe.settled), asked for
    where the code reads numbers in a way that no graph holds.

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
    check_constants(site)
    tensors = [at for at, leaf in enumerate(site.calls[0].leaves) if isinstance(leaf, Tensor)]
    moving = {at: tuple(sorted({*_moving_dims(site, at), *(free or {}).get(at, ())})) for at in tensors}
    example = _example(site, runs)
    try:
        graph, flex = _faithful(site, states, example, moving)
    except ExportError as error:
        if free:
            return export_block(site, states, runs, settled=settled)
        if isinstance(error, ReadError):
            graph, flex = _reading(site, states, example, moving, settled(), error)
        else:
            graph, flex = _without_routing(site, states, example, moving, error)
    operators = sum(node.op == "call_function" for node in graph.module.graph.nodes)
    done = f"{site.name}: {operators} operators, {len(graph.weights)} weights, inputs {', '.join(graph.inputs)}"
    done += "" if graph.row_dims is None else ", one row per call, since its code pins the batch"
    read = [spoken(site.module, site.calls[0], at) for at in graph.read]
    done += f", with the numbers of {' and '.join(read)}" if read else ""
    done += f", all experts of {', '.join(graph.experts)} on every token" if graph.experts else ""
    return graph, Report("export", (done, *(f"{site.name}: {line}" for line in flex)))


def _faithful(
    site: BlockSite,
    states: States,
    call: Call,
    moving: Mapping[int, tuple[int, ...]],
    settled: Settled | None = None,
) -> tuple[BlockGraph, tuple[str, ...]]:
    """The validated graph of `call`, and what was done to its attention."""
    graph, flex = _graph(site, states, call, moving, settled)
    try:
        _check_batch(graph, site)
        validate(graph, site)
    except ExportError as error:
        return _row_graph(site, states, call, moving, error, settled)
    return graph, flex


def _reading(
    site: BlockSite,
    states: States,
    call: Call,
    moving: Mapping[int, tuple[int, ...]],
    settled: Settled,
    error: ReadError,
) -> tuple[BlockGraph, tuple[str, ...]]:
    """The validated graph of `call` with numbers that are always the same read out; else its reason."""
    try:
        return _faithful(site, states, call, moving, settled)
    except ReadError as other:
        if any(site.batch_dims.get(at) is not None for at in settled):
            with suppress(ReadError):
                return _row_graph(site, states, call, moving, other, settled)
        return _without_routing(site, states, call, moving, other)
    except ExportError:
        return _without_routing(site, states, call, moving, error)


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
    site: BlockSite,
    states: States,
    call: Call,
    moving: Mapping[int, tuple[int, ...]],
    settled: Settled | None = None,
) -> tuple[BlockGraph, tuple[str, ...]]:
    """The graph of `call`, not validated, and what was done to what it read from tensors and to its attention.

    With `settled`, numbers are known of the tensors that the block holds, and of these leaves where no dimension moves.
    """
    program, read, held = trace(site, states, call, moving, settled)
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
    return BlockGraph(module, weights, inputs, tuple(moving), positions, read=read, held=held), (*counts, *flex.done)


def _row_graph(
    site: BlockSite,
    states: States,
    call: Call,
    moving: Mapping[int, tuple[int, ...]],
    error: ExportError,
    settled: Settled | None = None,
) -> tuple[BlockGraph, tuple[str, ...]]:
    """The validated graph of one row of `call`; where there is none, `error`: the batch was not what its code pins."""
    free = {at: tuple(dim for dim in dims if dim != site.batch_dims.get(at)) for at, dims in moving.items()}
    try:
        graph, flex = _graph(site, states, _row(site, states, call, 0), free, settled)
        graph = replace(graph, row_dims=tuple(site.batch_dims.get(at) for at in moving))
        validate(graph, site)
    except ReadError as other:
        raise other from error
    except ExportError as other:
        raise ExportError(f"{error} (nor is there a graph of a row alone: {other})") from error
    return graph, flex


def weight_values(graph: BlockGraph, module: nn.Module) -> list[Tensor]:
    """What `module` passes for ``graph.weights``, detached; it is the exported block or one of its group.

    A complex tensor is given as pairs where the graph takes pairs (see passes.blocks.complex_to_real).
    """
    constants = graph.module.meta["constants"]
    values = [
        constants[name] if name.startswith(CONSTANT) else _attribute(module, name).detach()
        for name in graph.weights.values()
    ]
    return _as_taken(graph, list(graph.weights), values)


def validate(graph: BlockGraph, site: BlockSite) -> None:
    """Run `graph` with the weights of `site` on each recorded call, and on the last row of the last.

    `site` is the exported block or one of its group. Raises ExportError on the first mismatch.
    """
    check_held(graph, site)
    for at, value in graph.read.items():
        if not is_known(site, at, value):
            raise ExportError(f"{site.name}: {spoken(site.module, site.calls[0], at)} holds other numbers elsewhere")
    weights = weight_values(graph, site.module)
    with torch.no_grad():
        for index, call in enumerate(site.calls):
            _compare(site, f"run {index}", graph, weights, call)
        states = States(tuple((k, graph.leaves[index]) for k, index in enumerate(graph.states)))
        _compare(site, "a single row", graph, weights, _row(site, states, site.calls[-1], -1))


def check_held(graph: BlockGraph, site: BlockSite) -> None:
    """ExportError where `site` holds, or is given, something else than is baked into `graph`, or not in every call."""
    held = held_by(site.module, modules_in(site.calls[0].leaves))
    for name, leaves in graph.held.items():
        own = held.get(name, {})
        same = own.keys() == leaves.keys() and all(same_held(leaf, own[key]) for key, leaf in leaves.items())
        if not same or name in site.changing:
            raise ExportError(f"{site.name}: holds another {name[1]} than is baked into the graph")


def leaf_names(site: BlockSite) -> list[str]:
    """A name for each tensor leaf of the block's call, from its place among the arguments."""
    call = site.calls[0]
    names = argument_names(site.module, call)
    return ["_".join(name) for name, leaf in zip(names, call.leaves, strict=True) if isinstance(leaf, Tensor)]


def _moving_dims(site: BlockSite, at: int) -> tuple[int, ...]:
    """Dimensions of leaf `at` that differ between runs (the batch always does)."""
    shapes = [leaf.shape for leaf in (call.leaves[at] for call in site.calls) if isinstance(leaf, Tensor)]
    if len({len(shape) for shape in shapes}) != 1:
        name = spoken(site.module, site.calls[0], at)
        raise ExportError(f"{site.name}: {name} has another number of dimensions in another run")
    return tuple(dim for dim in range(len(shapes[0])) if len({shape[dim] for shape in shapes}) > 1)


def _example(site: BlockSite, runs: Sequence[Run]) -> Call:
    """The largest call with a batch of two or more; of a model that takes one sample, the largest."""
    calls = [call for call, run in zip(site.calls, runs, strict=True) if run.batch >= 2 or lone(runs)]
    return max(calls, key=lambda call: sum(leaf.numel() for leaf in call.leaves if isinstance(leaf, Tensor)))


def _row(site: BlockSite, states: States, call: Call, row: int) -> Call:
    """The call with one row of the batch alone; outputs that are no states are dropped."""
    dims = [site.batch_dims.get(at) for at in range(len(call.leaves))]
    leaves = one_row(call.leaves, dims, row)  # type: ignore[arg-type]
    outputs = one_row(_states(call), [site.batch_dims[at] for _, at in states.pairs], row)
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
        off = distance(given, wanted)
        if not off <= TOLERANCE["graph"][wanted.dtype]:
            raise ExportError(f"{site.name}: state {index} of the graph is off by {off:.1e} on {what}")


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
