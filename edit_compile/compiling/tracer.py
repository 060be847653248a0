"""Programs of a model, traced form by form: the first trace fixes blocks and weights, others add what is missing."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edit_compile.compiling.dry_run import DryRun
from edit_compile.compiling.snapshot import Snapshot
from edit_compile.elastic.adapters import adapters_aside, adds_nothing
from edit_compile.elastic.layout import layout_of
from edit_compile.elastic.recorded_inputs import Inputs
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.progress import shown
from passes.assemble import Source, assemble, numbered_routers
from passes.check import CheckError, check_equal, masked
from passes.coverage import Coverage
from passes.graph import MlpSite, Report
from passes.memory import Memory
from passes.pipeline import Analysis, analyse, loosened
from passes.plans import plan_groups
from passes.preview import preview_glue
from passes.progress import tell
from passes.record import undisturbed
from passes.uncompiled import unwrapped
from passes.weightless import UNCHECKED, weightless
from runtime.base.errors import EditError
from runtime.bundle.program import Program
from runtime.face.arguments import argument_names, find_glue, flatten
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import Decider, RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy

log = logging.getLogger(__name__)


class CompileError(EditError, ValueError):
    """An argument of `compile` makes no sense, or the model cannot be compiled; the message says what to change."""


class Tracer:
    """Makes a program of a model, and adds the forms of call that it has not seen.

    Of what is recorded in a trace nothing is kept. `reports` are those of the last trace.
    """

    def __init__(
        self, model: nn.Module, widths: tuple[float, ...], timestep: str | None, policy: Decider | None = None
    ) -> None:
        self.elastic = model if isinstance(model, ElasticTransformer) else None
        self.model = unwrapped(self.elastic.model if self.elastic is not None else model)
        self.widths = widths
        self.timestep = timestep or (self.elastic.timestep if self.elastic is not None else None)
        self.policy = policy if isinstance(policy, RoutingPolicy) else self._own_policy()
        self.reports: tuple[Report, ...] = ()
        self._memory = Memory()
        self._sites: tuple[tuple[str, tuple[MlpSite, ...]], ...] = ()
        self._snapshot: Snapshot | None = None

    def _own_policy(self) -> RoutingPolicy:
        """The elastic model's own policy; the default one where it has none."""
        return (self.elastic.policy if self.elastic is not None else None) or RoutingPolicy()

    @property
    def routers(self) -> bool:
        """Whether the model is elastic."""
        return self.elastic is not None

    def __call__(self, given: Mapping[str, object], program: Program | None = None) -> Program:
        """The program that also covers a call with `given`: a first one, or `program` and what it lacks."""
        return self.grow(given, program) if program is not None and program.manifest.blocks else self.trace(given)

    def trace(self, inputs: Inputs) -> Program:
        """A program for `inputs`; CompileError where no block can be guarded."""
        with shown(f"compiling {type(self.model).__name__}"):
            return self._traced(inputs)

    def _traced(self, inputs: Inputs) -> Program:
        snapshot, memory = Snapshot.of(self.model), Memory()
        analysis = self._analyse(self.model, inputs)
        if not analysis.groups:
            _log(analysis.reports)
            raise CompileError(_nothing(self.model, analysis.reports))
        warning = Coverage.of(analysis).warning
        if warning is not None:
            warnings.warn(f"compile {warning}", stacklevel=2)
        if self.elastic is not None:
            self._give_routers(self.elastic, analysis)
            self._check_routers(self.elastic, analysis)
        program = self._assembled(analysis, self.untraced(), memory)
        self._memory, self._snapshot = memory, snapshot.without_changes(self.model)
        owners = (analysis.groups[owner] for owner in analysis.group_of)
        self._sites = tuple(
            (site.name, group.sites) for site, group in zip(analysis.discovery.blocks, owners, strict=True)
        )
        routers = self.elastic.router_tensors() if self.elastic is not None else {}
        return replace(program, routers=numbered_routers(routers, program.manifest.blocks))

    def grow(self, given: Mapping[str, object], program: Program) -> Program:
        """`program`, which this tracer made, with the form of the call `given` added.

        Raises CompileError where the model's weights are not those that were compiled any more.
        """
        changed = self.changed()
        if changed is not None:
            raise CompileError(
                f"the weights of {type(self.model).__name__} have changed since it was compiled (first: {changed}): "
                "compile it anew"
            )
        assert self._snapshot is not None
        snapshot = self._snapshot
        device = next(self.model.parameters()).device
        moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(given))
        with shown(f"adding a form of call to {type(self.model).__name__}"):
            analysis = self._analyse(self.model, moved, program.manifest.timestep, self._memory)
            grown = self._assembled(analysis, program, self._memory)
        self._snapshot = snapshot.without_changes(self.model)
        return grown

    def changed(self) -> str | None:
        """Name of the first parameter or buffer that is not as it was at the first trace; None where all are.

        What the model itself writes when it runs does not count.
        """
        return None if self._snapshot is None else self._snapshot.changed(self.model)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the model, and its routers, as `torch.nn.Module.to` does."""
        (self.model if self.elastic is None else self.elastic)._apply(fn)

    def _assembled(self, analysis: Analysis, program: Program, memory: Memory) -> Program:
        """`program` with what the analysis found, and with plans for other sizes than those that values set in it."""
        with self._dense():
            program, reports = self._added(analysis, program, memory)
            if memory.loose:
                more = loosened(analysis, self._narrow, memory)
                memory.loose.clear()
                try:
                    program, loose = self._added(more, program, memory)
                    reports = (*reports, *loose)
                except CheckError as error:  # there are plans for the sizes that were seen
                    log.info("no plan for any size that values may set: %s", error)
        self.reports = reports
        _log(reports)
        return program

    def _added(self, analysis: Analysis, program: Program, memory: Memory) -> tuple[Program, tuple[Report, ...]]:
        planned, widths = plan_groups(analysis, self.widths)
        assembled = assemble(analysis, planned, program, memory)
        return assembled.program, (*analysis.reports, *widths, *assembled.reports)

    def host(self, **kwargs: Any) -> Any:
        """The guarded model's forward, for programs whose glue is hosted."""
        glue = find_glue([glue for glue, _ in self._memory.hosts], *flatten(kwargs))
        return next(host for own, host in self._memory.hosts if own is glue)(**kwargs)

    def _give_routers(self, elastic: ElasticTransformer, analysis: Analysis) -> None:
        """Routers for an elastic model that has not been called yet, whose blocks are known now."""
        if elastic.layout is None:
            elastic.attach(layout_of(analysis, elastic.router_config.time_dim))

    def _check_routers(self, elastic: ElasticTransformer, analysis: Analysis) -> None:
        """Every block found has a router, and every width that it may choose is built."""
        routed = {block.name for block in elastic.layout.blocks} if elastic.layout else set()
        strange = [site.name for site in analysis.discovery.blocks if site.name not in routed]
        if strange:
            raise CompileError(f"{strange[0]} has no router: elasticize the model with the inputs it is compiled with")
        absent = [width for width in elastic.router_config.widths if width not in self.widths]
        if absent:
            raise CompileError(
                f"the routers choose among {elastic.router_config.widths}, but width {absent[0]} is not built"
            )

    def prove(self, compiled: CompiledTransformer, inputs: Inputs) -> None:
        """Compare what the engine runs with the masked eager model at every width (equation 13), on all `inputs`.

        Raises CheckError; the compiled transformer's policy and counters are put back.
        """
        with shown(f"checking {type(self.model).__name__}"), closing(self.at_widths(compiled, inputs)) as outputs:
            for width, output, expected in outputs:
                check_equal(output, expected, f"the {compiled.engine} engine at width {width}")

    def at_widths(self, compiled: CompiledTransformer, inputs: Inputs) -> Generator[tuple[float, Any, Any], None, None]:
        """(width, what `compiled` gives, what the masked eager model gives) at every width, on all `inputs`.

        Close it: it then leaves no trace of its calls.
        """
        buckets = [inputs] if isinstance(inputs, Mapping) else inputs
        total = len(buckets) * len(self.widths)
        try:
            for number, (kwargs, width) in enumerate(itertools.product(buckets, self.widths)):
                tell("comparing widths with the model", number, total)
                policy = ScheduledPolicy(np.full((1, len(self._sites)), width))
                compiled._reset_stateful_cache()
                with self._dense(), ExitStack() as masks:
                    for name, sites in self._sites:
                        masks.enter_context(masked(self.model.get_submodule(name), sites, width))
                    expected = self.model(**_copied(kwargs))
                with compiled.decided_by(policy):
                    output = compiled(**_copied(kwargs))
                yield width, output, expected
        finally:
            compiled._reset_stateful_cache()
            compiled.trace.clear()
            compiled.reset_counters()

    def dry_run(self, inputs: Inputs) -> DryRun:
        """What `trace` would make of `inputs`, nothing lowered; by shapes and data flow where there are no weights.

        The model is left as it is. Raises CompileError where a model without weights cannot be followed that way.
        """
        if not weightless(self.model):
            return self._preview(self.model, inputs)
        with self._dense():  # the copy is one without the elastic model's hooks
            bare = copy.deepcopy(self.model).to("meta")
        try:
            hollow = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)
            return replace(self._preview(bare, hollow), unchecked=UNCHECKED)
        except EditError:
            raise
        except Exception as error:
            told = str(error).strip().splitlines() or [""]
            raise CompileError(
                f"{type(self.model).__name__} cannot be followed without weights, load them for the dry run: "
                f"{type(error).__name__}: {told[0]}"
            ) from error

    def _preview(self, model: nn.Module, inputs: Inputs) -> DryRun:
        with shown(f"looking at {type(model).__name__}"):
            analysis = self._analyse(model, inputs)
        with self._dense():
            planned, reports = plan_groups(analysis, self.widths)
            glue = preview_glue(analysis)
            return DryRun.of(analysis, planned, (*analysis.reports, *reports, *glue), self.elastic)

    def untraced(self) -> Program:
        """A program with a manifest but nothing compiled yet."""
        return Program(self._source().manifest(self.widths), {}, {}, {})

    def _analyse(
        self, model: nn.Module, inputs: Inputs, timestep: str | None = None, memory: Memory | None = None
    ) -> Analysis:
        with self._dense():
            return analyse(model, inputs, timestep or self.timestep, self._narrow, memory)

    @property
    def _narrow(self) -> Sequence[str] | None:
        """Names of the states whose MLPs are narrowed, of an elastic model that says so."""
        return self.elastic.narrow if self.elastic is not None else None

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """The base model in eval mode without an elastic model's hooks; without a warning that every export repeats.

        Adapters that add nothing, as they are fused or switched off, are left out of sight.
        """
        hooks = self.elastic.detached() if self.elastic is not None else nullcontext()
        with hooks, adapters_aside(self.model, adds_nothing), undisturbed(self.model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
            yield

    def _source(self) -> Source:
        return Source(
            model=type(self.model).__name__,
            config=_config(self.model),
            dtype=str(_dtype(self.model)).removeprefix("torch."),
            timestep=self.timestep or "timestep",
            arguments=argument_names(self.model.forward),
            router=self.elastic.router_config if self.elastic is not None else None,
            policy=self.policy.to_spec(),
            attributes=_attributes(self.model),
        )


def _copied(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` with copies of its tensors, for a model that writes into them."""
    copied: dict[str, Any] = pytree.tree_map_only(Tensor, Tensor.clone, dict(kwargs))
    return copied


def _dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in: diffusers knows (some parameters may be kept wider), else its first parameter's."""
    own = getattr(model, "dtype", None)
    return own if isinstance(own, torch.dtype) else next(p.dtype for p in model.parameters() if p.is_floating_point())


def _config(model: nn.Module) -> dict[str, object]:
    """The model's diffusers config without its private entries; empty for other models."""
    return {k: v for k, v in dict(getattr(model, "config", {})).items() if not k.startswith("_")}


def _attributes(model: nn.Module) -> dict[str, bool | int | float | str | None]:
    """The model's own plain attributes: not those of every module, nor private ones."""
    own = vars(model).keys() - vars(nn.Module()).keys()
    plain = {name: getattr(model, name) for name in sorted(own) if not name.startswith("_")}
    return {name: value for name, value in plain.items() if isinstance(value, (bool, int, float, str))}


def _nothing(model: nn.Module, reports: Sequence[Any]) -> str:
    reasons = [f"{refusal.where}: {refusal.reason}" for report in reports for refusal in report.refused]
    return f"no block of {type(model).__name__} can be guarded. " + ("; ".join(reasons) or "It has no list of modules")


def _log(reports: Sequence[Any]) -> None:
    for report in reports:
        for line in report.done:
            log.info("%s: %s", report.name, line)
        for refusal in report.refused:
            log.info("%s: left %s alone: %s", report.name, refusal.where, refusal.reason)
