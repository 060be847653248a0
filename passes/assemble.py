"""From analysed graphs to a program: plans at every width, guards, one copy of the weights, files.

Numbers are checked before a program leaves here:

    each width          variant_v(weights[:rows_v], x)  =  block(x) with hidden channels rows_v.. masked to zero
    open gates          glue(x) with every guard answered at full width  =  the model's own output
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from passes.check import check_open, check_widths
from passes.cost import glue_flops, variant_cost
from passes.dedupe import plan_id
from passes.export import weight_values
from passes.graph import Discovery, PlanGraph, Report, Run
from passes.guards import (
    GlueGraph,
    guard_glue,
    guarded_copy,
    tensor_arguments,
)
from passes.lower import Files, lower_glue, lower_plan
from passes.pipeline import Analysis, Group
from passes.widths import at_widths
from runtime.arguments import flatten
from runtime.program import Program
from runtime.spec import SCHEMA, Block, Cost, Glue, GlueInput, Manifest, Plan, PlanInput, Policy, RouterConfig, Variant

_PACKAGES = ("torch", "diffusers", "onnx", "onnxscript")


@dataclass(frozen=True)
class Source:
    """What a manifest says of the model itself (see runtime.spec.Manifest)."""

    model: str
    config: dict[str, object]
    dtype: str
    timestep: str
    arguments: tuple[str, ...]
    router: RouterConfig | None = None
    routers: Mapping[str, Tensor] | None = None
    policy: Policy = field(default_factory=Policy)

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
        )


@dataclass(frozen=True)
class Planned:
    """A group's plan: its graphs, what the manifest says of it, and example inputs with two rows or more."""

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


def assemble(
    analysis: Analysis, planned: Sequence[Planned], source: Source, widths: Sequence[float]
) -> tuple[Program, tuple[Report, ...]]:
    """The program of an analysed model, with one glue per shape bucket.

    Raises:
        GuardError: the model's glue does not export.
        CheckError: the guarded program does not give the model's own output.
    """
    discovery = analysis.discovery
    blocks, weights = _blocks(analysis, planned)
    makers = {}
    for item in planned:
        makers.update(lower_plan(item.graph, item.plan, item.examples[0]))
    group_of = analysis.group_of
    states = [planned[owner].group.states for owner in group_of]
    graphs = [planned[owner].group.graph for owner in group_of]
    guarded = guarded_copy(discovery, states, graphs)
    glues, reports = [], []
    for bucket, (run, other) in enumerate(_bucket_runs(discovery)):
        graph, report = guard_glue(guarded, other, run)
        check_open(graph, other, discovery.model, partial(_full_width, planned, blocks, weights))
        glue = _glue(graph, f"{bucket}", other, planned)
        weights.update(graph.weights)
        _, tensors = tensor_arguments(other.kwargs)
        assert glue.file is not None
        makers[glue.file] = partial(lower_glue, graph, tensors)
        glues.append(glue)
        reports.append(report)
    empty = source.manifest(widths)
    manifest = Manifest(
        **{
            **{name: getattr(empty, name) for name in empty.__dataclass_fields__},
            "timestep": discovery.timestep,
            "plans": tuple(item.plan for item in planned),
            "blocks": blocks,
            "glues": tuple(glues),
        }
    )
    return Program(manifest, weights, _routers(source, blocks), Files(makers)), tuple(reports)


def _plan(analysis: Analysis, group: Group, graph: PlanGraph) -> Plan:
    site = analysis.discovery.blocks[group.members[0]]
    leaves = group.graph.leaves
    inputs = []
    for name, leaf in zip(group.graph.inputs, leaves, strict=True):
        seen = [_real(call.leaves[leaf]) for call in site.calls]
        shape = tuple(
            size if all(other.shape[d] == size for other in seen) else None for d, size in enumerate(seen[0].shape)
        )
        inputs.append(PlanInput(name, _dtype(seen[0]), shape, site.batch_dims.get(leaf)))
    return Plan(
        id=plan_id(graph),
        kind=type(site.module).__name__,
        inputs=tuple(inputs),
        states=group.graph.states,
        time=leaves.index(site.time) if site.time is not None else None,
        weights=tuple(piece.name for piece in graph.pieces),
        variants=tuple(
            Variant(width, tuple(piece.rows[v] for piece in graph.pieces)) for v, width in enumerate(graph.widths)
        ),
    )


def _examples(analysis: Analysis, group: Group) -> tuple[tuple[Tensor, ...], ...]:
    """The group's inputs at each bucket, from the runs with the doubled batch."""
    calls = analysis.discovery.blocks[group.members[0]].calls
    doubled = calls[len(calls) // 2 :]
    return tuple(tuple(_real(call.leaves[leaf]) for leaf in group.graph.leaves) for call in doubled)


def _blocks(analysis: Analysis, planned: Sequence[Planned]) -> tuple[tuple[Block, ...], dict[str, Tensor]]:
    """Every block with its own weights, cut as its plan reads them."""
    weights: dict[str, Tensor] = {}
    blocks = []
    for index, site in enumerate(analysis.discovery.blocks):
        item = planned[analysis.group_of[index]]
        names = dict(zip(item.group.graph.weights, weight_values(item.group.graph, site.module), strict=True))
        keys = []
        for piece in item.graph.pieces:
            key = f"{site.name}.{piece.name}"
            weights[key] = piece.cut(names[piece.source])
            keys.append(key)
        blocks.append(Block(site.name, item.plan.id, tuple(keys)))
    return tuple(blocks), weights


def _full_width(
    planned: Sequence[Planned],
    blocks: Sequence[Block],
    weights: Mapping[str, Tensor],
    index: int,
    inputs: Sequence[Tensor],
) -> list[Tensor]:
    item = next(item for item in planned if item.plan.id == blocks[index].plan)
    return list(item.graph.variants[-1](*(weights[key] for key in blocks[index].weights), *inputs))


def _bucket_runs(discovery: Discovery) -> list[tuple[Run, Run]]:
    """(as given, doubled) for each bucket."""
    half = len(discovery.runs) // 2
    return list(zip(discovery.runs[:half], discovery.runs[half:], strict=True))


def _glue(graph: GlueGraph, name: str, run: Run, planned: Sequence[Planned]) -> Glue:
    names, values = tensor_arguments(run.kwargs)
    inputs = []
    for argument, value in zip(names, values, strict=True):
        free = graph.batch_dims.get(argument)
        shape = tuple(None if d == free else size for d, size in enumerate(value.shape))
        inputs.append(GlueInput(argument, _dtype(value), shape))
    costs = tuple(
        Cost(item.plan.id, index, *variant_cost(item.graph, index, item.plan, item.examples[run.bucket]))
        for item in planned
        for index in range(len(item.plan.variants))
    )
    return Glue(
        id=name,
        file=f"glue/{name}.pt2",
        inputs=tuple(inputs),
        constants=flatten(run.kwargs)[1],
        weights=tuple(graph.weights),
        outputs=("sample",) if graph.outputs == 1 else tuple(f"output_{k}" for k in range(graph.outputs)),
        flops=glue_flops(graph, run),
        costs=costs,
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


def _real(leaf: object) -> Tensor:
    assert isinstance(leaf, Tensor)
    return torch.view_as_real(leaf) if leaf.is_complex() else leaf


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
