"""From analysed graphs to a program: plans at every width, guards, one copy of the weights, files.

A program grows: what an analysis found in another form of call is added, and nothing that is there is changed, but that
a plan is known to serve more shapes. Numbers are checked before a program leaves here:

    open gates          glue(x) with every guard answered at full width  =  the model's own output
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.fx import Interpreter

from passes.adapt import lone
from passes.calling import Calling, Guard, guarded_copy
from passes.check import CheckError, check_open, glue_outputs, hosted_outputs
from passes.cost import glue_flops, hosted_flops
from passes.export import weight_values
from passes.graph import BlockSite, PlanGraph, Report, Run
from passes.guards import GlueGraph, GuardError, guard_glue, hosted_report, moving_dims, tensor_arguments
from passes.latents import carrying_batch, find_latents
from passes.lower import Files, lower_glue, lower_plan
from passes.memory import Memory, grown_plan
from passes.pipeline import Analysis
from passes.plans import Planned, costs_of, dtype_name
from passes.progress import tell
from passes.weightless import hollow
from runtime.bundle.program import Program
from runtime.bundle.spec import (
    SCHEMA,
    Block,
    Cost,
    Form,
    Glue,
    GlueInput,
    Manifest,
    Policy,
    RouterConfig,
)
from runtime.face.arguments import find_glue, flatten

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
class Assembled:
    """A program, and what the passes said."""

    program: Program
    reports: tuple[Report, ...]


def assemble(analysis: Analysis, planned: Sequence[Planned], program: Program, memory: Memory) -> Assembled:
    """`program` with what an analysed model needs in the forms of call that were analysed: a glue for each.

    A glue that cannot be exported is hosted: the report says why, and the guarded model itself serves as glue. A glue
    that is there already stays as it is, with the costs of plans that its blocks were found to need as well.
    `memory` is that of `program`, and afterwards that of what is returned; where this raises, it is as it was.

    Raises:
        CheckError: the guarded program does not give the model's own output.
    """
    growth = _Growth(analysis, planned, program, memory)
    before = {name: len(ways) for name, ways in memory.ways.items()}
    try:
        growth.add_blocks()
        growth.add_glues()
    except BaseException:
        memory.loose.clear()
        for name in list(memory.ways):
            del memory.ways[name][before.get(name, 0) :]
        raise
    return Assembled(growth.finished(), tuple(growth.reports))


class _Growth:
    """A program on its way from what it was to what it will be."""

    def __init__(self, analysis: Analysis, planned: Sequence[Planned], program: Program, memory: Memory) -> None:
        self.discovery, self.planned, self.program, self.memory = analysis.discovery, planned, program, memory
        self.items = [planned[owner] for owner in analysis.group_of]
        self.blocks = {block.name: block for block in program.manifest.blocks}
        self.glues = list(program.manifest.glues)
        self.weights = dict(program.weights)
        self.makers: dict[str, Callable[[], bytes]] = {}
        self.guards: list[Guard] = []
        self.hosts: list[tuple[Glue, nn.Module]] = []
        self.reports: list[Report] = []
        held = next(iter((*program.weights.values(), *self.discovery.model.parameters())))
        self.device = held.device
        self._open: dict[int, tuple[PlanGraph, Form]] = {}
        self._answered: set[int] = set()

    def add_blocks(self) -> None:
        """Every block with its own weights, cut as its plan reads them, and its guard."""
        for site, item in zip(self.discovery.blocks, self.items, strict=True):
            form = self._form(site, item)
            calling = Calling.of(site, item.group.graph, item.group.states)
            number = list(self.blocks).index(site.name)
            ways = self.memory.ways.setdefault(site.name, [])
            if (form, calling) not in ways:
                ways.append((form, calling))
            self.guards.append(Guard(number, site.name, ((form, calling),)))
            self._open[number] = (item.graph, self.blocks[site.name].forms[form])

    def _form(self, site: BlockSite, item: Planned) -> int:
        """The number of the block's form with this plan, which is made where it is not there."""
        block = self.blocks.get(site.name)
        forms = () if block is None else block.forms
        for number, form in enumerate(forms):
            if form.plan == item.plan.id:
                return number
        names = dict(zip(item.group.graph.weights, weight_values(item.group.graph, site.module), strict=True))
        pieces = {piece.name: (piece.cut(names[piece.source]), names[piece.source]) for piece in item.graph.pieces}
        keys = tuple(self._stored(f"{site.name}.{name}", _own(*piece)) for name, piece in pieces.items())
        if block is None:
            self.blocks[site.name] = Block(site.name, item.plan.id, keys)
        else:
            self.blocks[site.name] = replace(block, others=(*block.others, Form(item.plan.id, keys)))
        return len(forms)

    def _stored(self, key: str, value: Tensor) -> str:
        """The name under which a weight is held: that of an equal one of the name, else one of its own.

        Code may hold constants elsewhere (tables on the host, sent to the GPU in every call); a program holds all in
        one place, which is where its graphs are loaded to.
        """
        name, count = key, 1
        while name in self.weights and not _equal(self.weights[name], value):
            count += 1
            name = f"{key}~{count}"
        if name not in self.weights:
            self.weights[name] = value.to(self.device)
        return name

    def add_glues(self) -> None:
        """A glue for every form of call that has none."""
        guarded = guarded_copy(self.discovery.model, self.guards, self.discovery.samples)
        for bucket, (given, doubled) in enumerate(self.discovery.buckets):
            tell("exporting the model around its blocks", bucket, len(self.discovery.buckets))
            costs = costs_of(self.planned, bucket)
            there = self._there(given)
            if there is None:
                self._add_glue(guarded, given, doubled, costs)
            else:
                glue = self.glues[there]
                self.glues[there] = replace(glue, costs=tuple(dict.fromkeys((*glue.costs, *costs))))

    def _there(self, given: Run) -> int | None:
        """The position of the glue for such arguments, if there is one."""
        found = find_glue(self.glues, *flatten(given.kwargs))
        return None if found is None else self.glues.index(found)

    def _add_glue(self, guarded: nn.Module, given: Run, doubled: Run, costs: tuple[Cost, ...]) -> None:
        name, model = str(len(self.glues)), self.discovery.model
        self._answered.clear()
        try:
            graph, shown, report = guard_glue(guarded, given, doubled, self._fits, name)
        except GuardError as error:
            guards = [replace(one, ways=self.memory.ways[one.name], hosted=True) for one in self.guards]
            guarded = guarded_copy(model, guards, self.discovery.samples)
            check_open(hosted_outputs(guarded, doubled), doubled, model, self._answer)
            outputs, shown = check_open(hosted_outputs(guarded, given), given, model, self._answer), given
            made = _hosted(name, given, doubled, costs, hosted_flops(guarded, self._states(), given))
            self.hosts.append((made, guarded))
            self.reports.append(hosted_report(error))
        else:
            outputs = check_open(glue_outputs(graph, shown), shown, model, self._answer)
            _warn_of_no_effect(graph)
            for number, k, dim in graph.loose:
                leaf = self._open[number][0].block.leaves[k]
                self.memory.loose.setdefault(list(self.blocks)[number], set()).add((leaf, dim))
            keys = tuple(self._stored(key, value.clone()) for key, value in graph.weights.items())
            made = _standalone(graph, name, shown, costs, keys)
            self.makers[f"glue/{name}.pt2"] = partial(lower_glue, replace(graph, weights={}))
            self.reports.append(report)
        missed = [one.name for one in self.guards if one.index not in self._answered]
        if missed:
            raise CheckError(f"{missed[0]} is called past its guard: something keeps a reference of its own to it")
        other = given if shown is doubled else doubled
        tensors = dict(zip(*tensor_arguments(shown.kwargs), strict=True))
        batched = None if lone(self.discovery.runs) else carrying_batch(shown.kwargs, other.kwargs)
        latents = find_latents(tensors, outputs, batched, self.discovery.timestep)
        self.glues.append(replace(made, latents=latents))

    def _fits(self, glue: GlueGraph, run: Run) -> bool:
        """Whether an exported glue gives what the model gives on another run than it was exported with."""
        inputs = [*glue.weights.values(), *tensor_arguments(run.kwargs)[1]]
        try:
            check_open(lambda: Interpreter(glue.module).run(*inputs), run, self.discovery.model, self._answer)
        except Exception:  # whatever the graph does to sizes that it was not made for
            return False
        return True

    def _answer(self, index: int, inputs: Sequence[Tensor], form: int = 0) -> list[Tensor]:
        """Guards answered in full, by the plan of the form of call that is being added."""
        graph, own = self._open[index]
        self._answered.add(index)
        return graph.block.run(
            graph.variants[-1], [self.weights[key].to(inputs[0].device) for key in own.weights], inputs
        )

    def _states(self) -> dict[int, tuple[int, ...]]:
        return {index: graph.block.states for index, (graph, _) in self._open.items()}

    def finished(self) -> Program:
        """What has become of the program; the memory is told."""
        for site, item in zip(self.discovery.blocks, self.items, strict=True):
            self.memory.remember(site, item.group.known, item.graph, item.group.states, item.group.sites, item.plan)
        latest = {glue.id: glue for glue in self.glues}
        self.memory.hosts = [(latest[glue.id], host) for glue, host in (*self.memory.hosts, *self.hosts)]
        plans = {plan.id: plan for plan in self.program.manifest.plans}
        for item in self.planned:
            if item.plan.id not in plans:
                self.makers.update(lower_plan(item.graph, item.plan))
            plans[item.plan.id] = grown_plan(plans.get(item.plan.id, item.plan), item.plan.buckets)
        manifest = replace(
            self.program.manifest,
            timestep=self.discovery.timestep,
            plans=tuple(plans.values()),
            blocks=tuple(self.blocks.values()),
            glues=tuple(self.glues),
        )
        return replace(
            self.program,
            manifest=manifest,
            weights=self.weights,
            files=Files.grown(self.program.files, self.makers),
        )


def _warn_of_no_effect(graph: GlueGraph) -> None:
    """A model that was run before may hold what it made of an argument, which has no effect then."""
    if graph.unused and any(name.startswith("glue.") for name in graph.weights):
        warnings.warn(
            f"what is given as {', '.join(graph.unused)} has no effect: the model does not read it, or holds what it "
            "once made of it; if so, clear that before compiling",
            stacklevel=2,
        )


def _own(piece: Tensor, source: Tensor) -> Tensor:
    """`piece` in memory of its own: a program must not change when the model is trained on, in part or in whole."""
    return piece.clone() if piece.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() else piece


def _equal(weight: Tensor, value: Tensor) -> bool:
    if weight.shape != value.shape or weight.dtype != value.dtype:
        return False
    return hollow(value) or torch.equal(weight, value.to(weight.device))


def _standalone(graph: GlueGraph, name: str, run: Run, costs: tuple[Cost, ...], weights: tuple[str, ...]) -> Glue:
    return Glue(
        id=name,
        file=f"glue/{name}.pt2",
        inputs=_glue_inputs(run, graph.batch_dims),
        constants=flatten(run.kwargs)[1],
        weights=weights,
        outputs=graph.outputs,
        flops=glue_flops(graph, run),
        costs=costs,
        sized_by=graph.sized_by,
    )


def _hosted(name: str, given: Run, doubled: Run, costs: tuple[Cost, ...], flops: int) -> Glue:
    moving = {argument: dims[0] for argument, dims in moving_dims(given, doubled).items() if dims}
    return Glue(
        id=name,
        file=None,
        inputs=_glue_inputs(given, moving),
        constants=flatten(given.kwargs)[1],
        weights=(),
        outputs=(),
        flops=flops,
        costs=costs,
    )


def _glue_inputs(run: Run, batch_dims: Mapping[str, int]) -> tuple[GlueInput, ...]:
    return tuple(
        GlueInput(
            name, dtype_name(value), tuple(None if d == batch_dims.get(name) else n for d, n in enumerate(value.shape))
        )
        for name, value in zip(*tensor_arguments(run.kwargs), strict=True)
    )


def numbered_routers(routers: Mapping[str, Tensor], blocks: Sequence[Block]) -> dict[str, Tensor]:
    """A copy of router tensors keyed by block index, of those keyed by ``<block name>/<parameter>``."""
    position = {block.name: index for index, block in enumerate(blocks)}
    numbered = {}
    for key, value in routers.items():
        name, _, parameter = key.partition("/")
        if name in position:
            numbered[f"{position[name]}.{parameter}"] = value.clone()
    return numbered
