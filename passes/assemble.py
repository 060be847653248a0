"""From analysed graphs to a program: plans at every width, guards, one copy of the weights, files.

Numbers are checked before a program leaves here:

    each width          variant_v(weights[:rows_v], x)  =  block(x) with hidden channels rows_v.. masked to zero
    open gates          glue(x) with every guard answered at full width  =  the model's own output
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.fx import Interpreter

from passes.check import check_open, check_widths, glue_outputs, hosted_outputs
from passes.cost import glue_flops, hosted_flops, variant_cost
from passes.dedupe import plan_id
from passes.export import weight_values
from passes.graph import PlanGraph, Report, Run
from passes.guards import (
    GlueGraph,
    GuardError,
    guard_glue,
    guarded_copy,
    hosted_report,
    moving_dims,
    tensor_arguments,
)
from passes.lower import Files, lower_glue, lower_plan
from passes.pipeline import Analysis, Group
from passes.real import as_real
from passes.widths import at_widths
from runtime.base.guard import Answer
from runtime.base.rows import one_row
from runtime.bundle.program import Program
from runtime.bundle.spec import (
    SCHEMA,
    Block,
    Cost,
    Glue,
    GlueInput,
    Manifest,
    Plan,
    PlanInput,
    Policy,
    RouterConfig,
    Variant,
)
from runtime.face.arguments import flatten

_PACKAGES = ("torch", "diffusers", "onnx", "onnxscript")


@dataclass(frozen=True)
class Source:
    """What a manifest says of the model itself (see runtime.bundle.spec.Manifest)."""

    model: str
    config: dict[str, object]
    dtype: str
    timestep: str
    arguments: tuple[str, ...]
    router: RouterConfig | None = None
    routers: Mapping[str, Tensor] | None = None
    policy: Policy = field(default_factory=Policy)
    attributes: dict[str, bool | int | float | str | None] = field(default_factory=dict)

    def manifest(self, widths: Sequence[float]) -> Manifest:
        """A manifest that holds no plans, blocks or glue yet."""
        return Manifest(
            schema=SCHEMA,
            model=self.model,
            config=self.config,
            dtype=self.dtype,
            timestep=self.timestep,
            arguments=self.arguments,
            widths=tuple(widths),
            plans=(),
            blocks=(),
            glues=(),
            router=self.router,
            policy=self.policy,
            versions={name: version(name) for name in _PACKAGES},
            attributes=self.attributes,
        )


@dataclass(frozen=True)
class Planned:
    """A group's plan: its graphs, what the manifest says of it, and example inputs (two rows or more, if it takes more
    than one)."""

    group: Group
    graph: PlanGraph
    plan: Plan
    examples: tuple[tuple[Tensor, ...], ...]


def plan_groups(analysis: Analysis, widths: Sequence[float]) -> tuple[tuple[Planned, ...], tuple[Report, ...]]:
    """Every group at every width, each checked against its masked block."""
    planned, reports = [], []
    for group in analysis.groups:
        graph, report = at_widths(group.graph, group.sites, widths)
        check_widths(group, graph, analysis.discovery.blocks[group.members[0]])
        planned.append(Planned(group, graph, _plan(analysis, group, graph), _examples(analysis, group)))
        reports.append(report)
    return tuple(planned), tuple(reports)


@dataclass(frozen=True)
class Assembled:
    """A program, what the passes said, and the guarded model where some glue is hosted by it (None where none is)."""

    program: Program
    reports: tuple[Report, ...]
    host: nn.Module | None


def assemble(analysis: Analysis, planned: Sequence[Planned], source: Source, widths: Sequence[float]) -> Assembled:
    """The program of an analysed model, with one glue per shape bucket.

    A glue that cannot be exported is hosted: the report says why, and the guarded model itself serves as glue.

    Raises:
        CheckError: the guarded program does not give the model's own output.
    """
    discovery = analysis.discovery
    device = next(discovery.model.parameters()).device
    blocks, weights = _blocks(analysis, planned, device)
    makers = {}
    for item in planned:
        makers.update(lower_plan(item.graph, item.plan))
    owners = [planned[owner].group for owner in analysis.group_of]
    guarded = guarded_copy(discovery, [group.states for group in owners], [group.graph for group in owners])
    open_gates = partial(_full_width, planned, blocks, dict(weights))
    fits = partial(_fits, discovery.model, open_gates)
    glues, reports = [], []
    for bucket, (given, doubled) in enumerate(discovery.buckets):
        costs = _costs(planned, bucket)
        try:
            graph, shown, report = guard_glue(guarded, given, doubled, fits)
        except GuardError as error:
            for run in (doubled, given):
                check_open(hosted_outputs(guarded, run), run, discovery.model, open_gates)
            glues.append(_hosted(guarded, f"{bucket}", given, doubled, costs))
            reports.append(hosted_report(error))
            continue
        check_open(glue_outputs(graph, shown), shown, discovery.model, open_gates)
        glues.append(_standalone(graph, f"{bucket}", shown, costs))
        weights.update({name: value.to(device, copy=True) for name, value in graph.weights.items()})
        makers[f"glue/{bucket}.pt2"] = partial(lower_glue, graph)
        reports.append(report)
    manifest = replace(
        source.manifest(widths),
        timestep=discovery.timestep,
        plans=tuple({item.plan.id: item.plan for item in planned}.values()),
        blocks=blocks,
        glues=tuple(glues),
    )
    host = guarded if any(glue.file is None for glue in glues) else None
    return Assembled(Program(manifest, weights, _routers(source, blocks), Files(makers)), tuple(reports), host)


def _fits(model: nn.Module, open_gates: Answer, glue: GlueGraph, run: Run) -> bool:
    """Whether an exported glue gives what the model gives on another run than it was exported with."""
    inputs = [*glue.weights.values(), *tensor_arguments(run.kwargs)[1]]
    try:
        check_open(lambda: Interpreter(glue.module).run(*inputs), run, model, open_gates)
    except Exception:  # whatever the graph does to sizes that it was not made for
        return False
    return True


def _plan(analysis: Analysis, group: Group, graph: PlanGraph) -> Plan:
    site = analysis.discovery.blocks[group.members[0]]
    leaves, single = group.graph.leaves, group.graph.row_dims is not None
    inputs = []
    for name, leaf in zip(group.graph.inputs, leaves, strict=True):
        seen = [as_real(call.leaves[leaf]) for call in site.calls]
        if single:
            seen = [one_row([value], [site.batch_dims.get(leaf)])[0] for value in seen]
        shape = tuple(
            size if all(other.shape[d] == size for other in seen) else None for d, size in enumerate(seen[0].shape)
        )
        inputs.append(PlanInput(name, _dtype(seen[0]), shape, site.batch_dims.get(leaf)))
    kind = type(site.module).__name__
    time = leaves.index(site.time) if site.time is not None else None
    examples = _examples(analysis, group)
    sizes = [tuple(value.shape) for example in examples for value in example]
    dtypes = [node.meta["val"].dtype for node in graph.variants[-1].graph.find_nodes(op="placeholder")]
    return Plan(
        id=plan_id(graph, (kind, inputs, time, sizes, dtypes)),
        kind=kind,
        inputs=tuple(inputs),
        states=group.graph.states,
        time=time,
        weights=tuple(piece.name for piece in graph.pieces),
        variants=tuple(
            Variant(width, tuple(piece.rows[v] for piece in graph.pieces)) for v, width in enumerate(graph.widths)
        ),
        single_row=single,
        buckets=_buckets(examples, inputs),
    )


def _buckets(
    examples: Sequence[Sequence[Tensor]], inputs: Sequence[PlanInput]
) -> tuple[tuple[tuple[int | None, ...], ...], ...]:
    """The sets of shapes of `examples`, each once, without the batch where that is free."""
    shapes = [
        tuple(
            tuple(None if d == spec.batch_dim and spec.shape[d] is None else size for d, size in enumerate(value.shape))
            for value, spec in zip(example, inputs, strict=True)
        )
        for example in examples
    ]
    return tuple(dict.fromkeys(shapes))


def _examples(analysis: Analysis, group: Group) -> tuple[tuple[Tensor, ...], ...]:
    """The group's inputs at each bucket, from the runs with the doubled batch; one row where the graph takes one."""
    calls = analysis.discovery.blocks[group.members[0]].calls
    graph, doubled = group.graph, calls[len(calls) // 2 :]
    examples = [[as_real(call.leaves[leaf]) for leaf in graph.leaves] for call in doubled]
    if graph.row_dims is not None:
        examples = [one_row(example, graph.row_dims) for example in examples]
    return tuple(map(tuple, examples))


def _blocks(
    analysis: Analysis, planned: Sequence[Planned], device: torch.device
) -> tuple[tuple[Block, ...], dict[str, Tensor]]:
    """Every block with its own weights, cut as its plan reads them, on `device`.

    Code may hold constants elsewhere (tables on the host, sent to the GPU in every call); a program holds all in one
    place, which is where its graphs are loaded to.
    """
    weights: dict[str, Tensor] = {}
    blocks = []
    for index, site in enumerate(analysis.discovery.blocks):
        item = planned[analysis.group_of[index]]
        names = dict(zip(item.group.graph.weights, weight_values(item.group.graph, site.module), strict=True))
        keys = []
        for piece in item.graph.pieces:
            key = f"{site.name}.{piece.name}"
            weights[key] = _own(piece.cut(names[piece.source]), names[piece.source]).to(device)
            keys.append(key)
        blocks.append(Block(site.name, item.plan.id, tuple(keys)))
    return tuple(blocks), weights


def _own(piece: Tensor, source: Tensor) -> Tensor:
    """`piece` in memory of its own: a program must not change when the model is trained on, in part or in whole."""
    return piece.clone() if piece.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() else piece


def _full_width(
    planned: Sequence[Planned],
    blocks: Sequence[Block],
    weights: Mapping[str, Tensor],
    index: int,
    inputs: Sequence[Tensor],
    form: int = 0,
) -> list[Tensor]:
    item = next(item for item in planned if item.plan.id == blocks[index].plan)
    return item.graph.block.run(item.graph.variants[-1], [weights[key] for key in blocks[index].weights], inputs)


def _costs(planned: Sequence[Planned], bucket: int) -> tuple[Cost, ...]:
    return tuple(
        Cost(item.plan.id, index, *variant_cost(item.graph, index, item.plan, item.examples[bucket]))
        for item in planned
        for index in range(len(item.plan.variants))
    )


def _standalone(graph: GlueGraph, name: str, run: Run, costs: tuple[Cost, ...]) -> Glue:
    return Glue(
        id=name,
        file=f"glue/{name}.pt2",
        inputs=_glue_inputs(run, graph.batch_dims),
        constants=flatten(run.kwargs)[1],
        weights=tuple(graph.weights),
        outputs=graph.outputs,
        flops=glue_flops(graph, run),
        costs=costs,
    )


def _hosted(guarded: nn.Module, name: str, given: Run, doubled: Run, costs: tuple[Cost, ...]) -> Glue:
    moving = {argument: dims[0] for argument, dims in moving_dims(given, doubled).items() if dims}
    return Glue(
        id=name,
        file=None,
        inputs=_glue_inputs(given, moving),
        constants=flatten(given.kwargs)[1],
        weights=(),
        outputs=(),
        flops=hosted_flops(guarded, given),
        costs=costs,
    )


def _glue_inputs(run: Run, batch_dims: Mapping[str, int]) -> tuple[GlueInput, ...]:
    return tuple(
        GlueInput(
            name, _dtype(value), tuple(None if d == batch_dims.get(name) else n for d, n in enumerate(value.shape))
        )
        for name, value in zip(*tensor_arguments(run.kwargs), strict=True)
    )


def _routers(source: Source, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Router tensors keyed by block index; `source.routers` is keyed by ``<block name>/<parameter>``."""
    position = {block.name: index for index, block in enumerate(blocks)}
    routers = {}
    for key, value in (source.routers or {}).items():
        name, _, parameter = key.partition("/")
        if name in position:
            routers[f"{position[name]}.{parameter}"] = value
    return routers


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
