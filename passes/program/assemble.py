"""From plans and glue to a program: one copy of the weights, and a manifest that says what each part of it is.

A program grows: what was found in another form of call is added, and nothing that is there is changed, but that
a plan is known to serve more shapes. Numbers are checked before a program leaves here:

    open gates          glue(x) with every guard answered at full width  =  the model's own output
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import torch
from torch import Tensor, nn

from passes.graphs.cost import glue_flops, hosted_flops
from passes.graphs.glue_graph import GlueGraph, tensor_arguments
from passes.graphs.graph import BlockSite, PlanGraph
from passes.graphs.weightless import hollow
from passes.observe.adapt import lone
from passes.observe.dedupe import graph_id
from passes.observe.latents import carrying_batch, find_latents
from passes.program.check import CheckError, check_open, glue_outputs, hosted_outputs
from passes.program.compilation import Compilation, FormGlue, Planned
from passes.program.glue import cut_weights, guarded_blocks
from passes.program.memory import grown_plan
from passes.program.plans import costs_of
from runtime.bundle.program import Program
from runtime.bundle.spec import SCHEMA, Block, Cost, Form, Manifest, Policy, RouterConfig
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
    telling_none: tuple[str, ...] = ()

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
            telling_none=self.telling_none,
        )


class Assemble:
    """Cut the blocks' weights as their plans read them, and compare the guarded model with its own, all gates open."""

    name, needed = "assemble", True

    def run(self, compilation: Compilation) -> Compilation:
        """With the `program`, but for its files, and what its manifest says of each glue.

        Raises CheckError where the guarded model does not give the model's own output.
        """
        assembly = _Assembly(compilation)
        assembly.add_blocks()
        assembly.add_glues()
        return assembly.finished()


class _Assembly:
    """A program on its way from what it was to what it will be."""

    def __init__(self, compilation: Compilation) -> None:
        assert compilation.program is not None
        self.compilation, self.discovery, self.program = compilation, compilation.discovery, compilation.program
        self.blocks = {block.name: block for block in self.program.manifest.blocks}
        self.glues = list(self.program.manifest.glues)
        self.weights = dict(self.program.weights)
        self.made: list[FormGlue] = []
        self.proven: set[str] = set()
        held = next(iter((*self.program.weights.values(), *compilation.model.parameters())))
        self.device = held.device
        self.shared = memory_of(compilation.model)
        self._open: dict[int, tuple[PlanGraph, Form]] = {}
        self._answered: set[int] = set()

    def add_blocks(self) -> None:
        """Every block with its own weights, cut as its plan reads them."""
        for one, site, item in guarded_blocks(self.compilation):
            form = self._form(site, item)
            self._open[one.index] = (item.graph, self.blocks[site.name].forms[form])

    def _form(self, site: BlockSite, item: Planned) -> int:
        """The number of the block's form with this plan, which is made where it is not there."""
        block = self.blocks.get(site.name)
        forms = () if block is None else block.forms
        for number, form in enumerate(forms):
            if form.plan == item.plan.id:
                return number
        pieces = cut_weights(site, item)
        keys = tuple(self._stored(f"{site.name}.{name}", self._held(*piece)) for name, piece in pieces.items())
        if block is None:
            self.blocks[site.name] = Block(site.name, item.plan.id, keys)
        else:
            self.blocks[site.name] = replace(block, others=(*block.others, Form(item.plan.id, keys)))
        return len(forms)

    def _held(self, piece: Tensor, source: Tensor) -> Tensor:
        """`piece` as it is where it is the model's own memory (see `owned`) or a copy; else a copy of it."""
        place = piece.untyped_storage().data_ptr()
        return piece.clone() if place == source.untyped_storage().data_ptr() and place not in self.shared else piece

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
        """Those that the pass "guards" made, with their work; what is known of the others grows."""
        made = {glue.bucket: glue for glue in self.compilation.glues}
        for bucket, (given, _) in enumerate(self.discovery.buckets):
            costs = costs_of(self.compilation.planned, bucket)
            if bucket in made:
                self._add_glue(made[bucket], costs)
            else:
                glue = find_glue(self.glues, *flatten(given.kwargs))
                assert glue is not None
                grown = replace(glue, costs=tuple(dict.fromkeys((*glue.costs, *costs))))
                self.glues[self.glues.index(glue)] = grown

    def _add_glue(self, glue: FormGlue, costs: tuple[Cost, ...]) -> None:
        model, shown = self.compilation.model, glue.shown
        keys: tuple[str, ...] = ()
        self._answered.clear()
        if glue.graph is not None:
            outputs = check_open(glue_outputs(glue.graph, shown), shown, model, self._answer)
            _warn_of_no_effect(glue.graph)
            self.proven.add(graph_id(glue.graph.module.graph))
            keys = tuple(self._stored(key, value.clone()) for key, value in glue.graph.weights.items())
            flops = glue_flops(glue.graph, shown)
        else:
            assert glue.host is not None
            check_open(hosted_outputs(glue.host, glue.other), glue.other, model, self._answer)
            outputs = check_open(hosted_outputs(glue.host, shown), shown, model, self._answer)
            states = {index: graph.block.states for index, (graph, _) in self._open.items()}
            flops = hosted_flops(glue.host, states, shown)
        missed = [one.name for one in self.compilation.guards if one.index not in self._answered]
        if missed:
            raise CheckError(f"{missed[0]} is called past its guard: something keeps a reference of its own to it")
        tensors = dict(zip(*tensor_arguments(shown.kwargs), strict=True))
        batched = None if lone(self.discovery.runs) else carrying_batch(shown.kwargs, glue.other.kwargs)
        latents = find_latents(tensors, outputs, batched, self.discovery.timestep)
        entry = replace(glue.entry, weights=keys, flops=flops, costs=costs, latents=latents)
        self.glues.append(entry)
        self.made.append(replace(glue, entry=entry))

    def _answer(self, index: int, inputs: Sequence[Tensor], form: int = 0) -> list[Tensor]:
        """Guards answered in full, by the plan of the form of call that is being added."""
        graph, own = self._open[index]
        self._answered.add(index)
        return graph.block.run(
            graph.variants[-1], [self.weights[key].to(inputs[0].device) for key in own.weights], inputs
        )

    def finished(self) -> Compilation:
        """With what has become of the program."""
        plans = {plan.id: plan for plan in self.program.manifest.plans}
        for item in self.compilation.planned:
            plans[item.plan.id] = grown_plan(plans.get(item.plan.id, item.plan), item.plan.buckets)
        first = not self.program.manifest.glues
        manifest = replace(
            self.program.manifest,
            batch=self.discovery.buckets[0][0].batch if first else self.program.manifest.batch,
            timestep=self.discovery.timestep,
            plans=tuple(plans.values()),
            blocks=tuple(self.blocks.values()),
            glues=tuple(self.glues),
        )
        return replace(
            self.compilation,
            program=replace(self.program, manifest=manifest, weights=self.weights),
            glues=tuple(self.made),
            proven=self.compilation.proven | self.proven,
        )


def _warn_of_no_effect(graph: GlueGraph) -> None:
    """A model that was run before may hold what it made of an argument, which has no effect then."""
    if graph.unused and any(name.startswith("glue.") for name in graph.weights):
        warnings.warn(
            f"what is given as {', '.join(graph.unused)} has no effect: the model does not read it, or holds what it "
            "once made of it; if so, clear that before compiling",
            stacklevel=2,
        )


def owned(program: Program, model: nn.Module) -> Program:
    """`program` with its weights in memory of its own: it must not change when the model is trained on.

    Until then what is not cut otherwise is the model's own memory.
    """
    shared = memory_of(model)
    weights = {
        key: value.clone() if value.untyped_storage().data_ptr() in shared else value
        for key, value in program.weights.items()
    }
    return replace(program, weights=weights)


def memory_of(model: nn.Module) -> set[int]:
    """Addresses of the memory of its parameters and buffers."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())} - {0}


def _equal(weight: Tensor, value: Tensor) -> bool:
    if weight.shape != value.shape or weight.dtype != value.dtype:
        return False
    return hollow(value) or torch.equal(weight, value.to(weight.device))


def numbered_routers(routers: Mapping[str, Tensor], blocks: Sequence[Block]) -> dict[str, Tensor]:
    """A copy of router tensors keyed by block index, of those keyed by ``<block name>/<parameter>``."""
    position = {block.name: index for index, block in enumerate(blocks)}
    numbered = {}
    for key, value in routers.items():
        name, _, parameter = key.partition("/")
        if name in position:
            numbered[f"{position[name]}.{parameter}"] = value.clone()
    return numbered
