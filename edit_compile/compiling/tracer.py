"""Programs of a model, traced form by form: the first trace fixes blocks and weights, others add what is missing."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edit_compile.compiling.described import attributes_of, config_of, dtype_of
from edit_compile.compiling.dry_run import DryRun
from edit_compile.compiling.mixed_widths import mixed_widths
from edit_compile.compiling.snapshot import Snapshot
from edit_compile.elastic.adapters import adapters_aside, adds_nothing
from edit_compile.elastic.layout import PASSES, Layout
from edit_compile.elastic.recorded_inputs import Inputs
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.progress import shown
from passes.dump import DumpError, dumping
from passes.graphs.graph import MlpSite, Report
from passes.graphs.progress import tell
from passes.graphs.record import own, undisturbed
from passes.graphs.uncompiled import unwrapped
from passes.graphs.weightless import UNCHECKED, weightless
from passes.observe.statement import BlockStatement, Statements, as_statements
from passes.pipeline import Pass, check_passes, run_passes
from passes.program.assemble import Source, numbered_routers, owned
from passes.program.check import CheckError, check_equal, masked
from passes.program.compilation import Compilation, PassError
from passes.program.coverage import Coverage
from passes.program.memory import Memory
from runtime.base.errors import EditError
from runtime.bundle.program import Program
from runtime.face.arguments import argument_names, find_glue, flatten, telling_none, without_silent
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import Decider, RoutingPolicy
from runtime.routing.schedule import ScheduledPolicy

log = logging.getLogger(__name__)


class CompileError(EditError, ValueError):
    """An argument of `compile` makes no sense, or the model cannot be compiled; the message says what to change."""


class Tracer:
    """Makes a program of a model, and adds the forms of call that it has not seen.

    Of what is recorded in a trace nothing is kept. `reports` are those of the last trace. `dump` is a folder for the
    state after each of `passes` (see passes.dump); later runs of them, for other forms of call, have folders in it:
    ``run-2``, ``run-3``, ...

    Raises PassError where `passes` cannot run, CompileError where `blocks` says of an elastic model what it does not.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: tuple[float, ...],
        timestep: str | None,
        policy: Decider | None = None,
        passes: Sequence[Pass] = PASSES,
        dump: str | Path | None = None,
        blocks: BlockStatement | Sequence[BlockStatement] | None = None,
    ) -> None:
        check_passes(passes)
        self.elastic = model if isinstance(model, ElasticTransformer) else None
        if self._unrouted and "layout" not in (one.name for one in passes):
            raise PassError("the pass 'layout' cannot be left out: the model's routers, yet to be made, need it")
        self.model = unwrapped(self.elastic.model if self.elastic is not None else model)
        self.widths = widths
        self.timestep = timestep or (self.elastic.timestep if self.elastic is not None else None)
        self.stated = self._stated(as_statements(blocks))
        self.policy = policy if isinstance(policy, RoutingPolicy) else self._own_policy()
        self.passes, self.dump = tuple(passes), None if dump is None else Path(dump)
        if self.dump is not None:
            with dumping(self.dump):
                self.dump.mkdir(parents=True, exist_ok=True)
        self.reports: tuple[Report, ...] = ()
        self._runs = 0
        self._memory = Memory()
        self._sites: tuple[tuple[str, tuple[MlpSite, ...]], ...] = ()
        self._snapshot: Snapshot | None = None

    def _own_policy(self) -> RoutingPolicy:
        """The elastic model's own policy; the default one where it has none."""
        return (self.elastic.policy if self.elastic is not None else None) or RoutingPolicy()

    def _stated(self, given: Statements) -> Statements:
        """What is stated of the blocks: an elastic model knows that itself."""
        own = given if self.elastic is None else self.elastic.stated
        if given and own != given:
            raise CompileError("an elastic model keeps what is stated of it: give blocks= to elasticize instead")
        return own

    @property
    def _unrouted(self) -> bool:
        """Whether the model's routers have yet to be made."""
        return self.elastic is not None and self.elastic.layout is None

    @property
    def routers(self) -> bool:
        """Whether the model is elastic."""
        return self.elastic is not None

    def __call__(self, given: Mapping[str, object], program: Program | None = None) -> Program:
        """The program that also covers a call with `given`: a first one, or `program` and what it lacks."""
        if program is not None and program.manifest.blocks:
            return self.grow(given, program)
        return owned(self.trace(given), self.model)

    def trace(self, inputs: Inputs) -> Program:
        """A program for `inputs`, some of whose weights are the model's own; CompileError where no block is guarded."""
        with shown(f"compiling {type(self.model).__name__}"):
            return self._traced(inputs)

    def _traced(self, inputs: Inputs) -> Program:
        snapshot, memory = Snapshot.of(self.model), Memory()
        found = self._run(self._given(self.model, inputs, memory), until="streams")
        if not found.groups:
            raise CompileError(_nothing(self.model, found.reports))
        warning = Coverage.of(found).warning
        if warning is not None:
            warnings.warn(f"compile {warning}", stacklevel=2)
        if self.elastic is not None:
            self._check_routers(self.elastic, found)
        made = self._completed(found)
        if self.elastic is not None and isinstance(made.layout, Layout):
            self.elastic.attach(made.layout)
        self._memory, self._snapshot = memory, snapshot.without_changes(made.discovery.written)
        owners = (made.groups[owner] for owner in made.group_of)
        self._sites = tuple((site.name, group.sites) for site, group in zip(made.blocks, owners, strict=True))
        routers = self.elastic.router_tensors() if self.elastic is not None else {}
        assert made.program is not None
        return replace(made.program, routers=numbered_routers(routers, made.manifest.blocks))

    def grow(self, given: Mapping[str, object], program: Program) -> Program:
        """`program`, which this tracer made, with the form of the call `given` added.

        Raises CompileError where the model's weights and attributes are not those that were compiled any more.
        """
        changed = self.changed()
        if changed is not None:
            raise CompileError(
                f"weights or attributes of {type(self.model).__name__} have changed since it was compiled (first: "
                f"{changed}): compile it anew"
            )
        assert self._snapshot is not None
        snapshot = self._snapshot
        device = next(self.model.parameters()).device
        moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(given))
        with shown(f"adding a form of call to {type(self.model).__name__}"):
            try:
                grown = self._completed(self._given(self.model, moved, self._memory, program))
            except DumpError as error:  # what serves goes on
                warnings.warn(f"{error}; nothing more is dumped", stacklevel=2)
                self.dump = None
                grown = self._completed(self._given(self.model, moved, self._memory, program))
        self._snapshot = snapshot.without_changes(grown.discovery.written)
        assert grown.program is not None
        return owned(grown.program, self.model)

    def changed(self) -> str | None:
        """Name of the first weight or attribute that is not as it was at the first trace; None where all are.

        What the model itself writes when it runs does not count.
        """
        return None if self._snapshot is None else self._snapshot.changed()

    def told(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` without what says nothing."""
        forward = self.model.forward
        return without_silent(given, argument_names(forward), telling_none(forward))

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the model, and its routers, as `torch.nn.Module.to` does."""
        (self.model if self.elastic is None else self.elastic)._apply(fn)

    def _completed(self, compilation: Compilation) -> Compilation:
        """What the passes make of it, with plans for other sizes than those that values set in what was recorded."""
        made = self._run(compilation)
        if made.memory.loose:
            try:
                loose = self._run(self._loosened(made))
            except CheckError as error:  # there are plans for the sizes that were seen
                log.info("no plan for any size that values may set: %s", error)
            else:
                made = replace(made.reported(*loose.reports), program=loose.program)
            made.memory.loose.clear()
        self.reports = made.reports
        return made

    def _loosened(self, made: Compilation) -> Compilation:
        """The blocks whose sizes values set and that have no plan for any such size, to be given one."""
        again = self._given(made.model, made.inputs, made.memory, made.program)
        blocks = tuple(site for site in made.blocks if made.memory.lacks(site))
        found = replace(made.discovery, blocks=blocks)
        return replace(again, found=found, blocks=blocks, serving=False)

    def host(self, **kwargs: Any) -> Any:
        """The guarded model's forward, for programs whose glue is hosted."""
        glue = find_glue([glue for glue, _ in self._memory.hosts], *flatten(kwargs))
        return next(host for own, host in self._memory.hosts if own is glue)(**kwargs)

    def _check_routers(self, elastic: ElasticTransformer, found: Compilation) -> None:
        """Every block found has a router, or will get one, and every width that it may choose is built."""
        routed = None if elastic.layout is None else {block.name for block in elastic.layout.blocks}
        strange = [] if routed is None else [site.name for site in found.blocks if site.name not in routed]
        if strange:
            raise CompileError(f"{strange[0]} has no router: elasticize the model with the inputs it is compiled with")
        absent = [width for width in elastic.router_config.widths if width not in self.widths]
        if absent:
            raise CompileError(
                f"the routers choose among {elastic.router_config.widths}, but width {absent[0]} is not built"
            )

    def prove(self, compiled: CompiledTransformer, inputs: Inputs) -> None:
        """Compare what the engine runs with the masked eager model (equation 13), every plan at every width.

        On all `inputs`. Blocks of one plan have different widths in a call, so that few calls show all. Raises
        CheckError; the compiled transformer's policy and counters are put back.
        """
        blocks = compiled.program.manifest.blocks
        mixed = mixed_widths([tuple(form.plan for form in block.forms) for block in blocks], self.widths)
        with shown(f"checking {type(self.model).__name__}"), closing(self.at(mixed, compiled, inputs)) as outputs:
            for widths, output, expected in outputs:
                told = ", ".join(f"{width:g}" for width in sorted(set(widths)))
                check_equal(output, expected, f"the {compiled.engine} engine with blocks at width {told}")

    def at_widths(self, compiled: CompiledTransformer, inputs: Inputs) -> Generator[tuple[float, Any, Any], None, None]:
        """(width, what `compiled` gives, what the masked eager model gives) at every width, on all `inputs`.

        Close it: it then leaves no trace of its calls.
        """
        alike = [(width,) * len(self._sites) for width in self.widths]
        for widths, output, expected in self.at(alike, compiled, inputs):
            yield widths[0], output, expected

    def at(
        self, widths: Sequence[tuple[float, ...]], compiled: CompiledTransformer, inputs: Inputs
    ) -> Generator[tuple[tuple[float, ...], Any, Any], None, None]:
        """As `at_widths`, with the blocks at each of `widths`, one for every block."""
        buckets = [inputs] if isinstance(inputs, Mapping) else inputs
        total = len(buckets) * len(widths)
        try:
            for number, (kwargs, chosen) in enumerate(itertools.product(buckets, widths)):
                tell("comparing widths with the model", number, total)
                compiled._reset_stateful_cache()
                with self._dense(), ExitStack() as masks:
                    for (name, sites), width in zip(self._sites, chosen, strict=True):
                        masks.enter_context(masked(self.model.get_submodule(name), sites, width))
                    expected = self.model(**own(kwargs))
                with compiled.decided_by(ScheduledPolicy(np.array([chosen]))):
                    output = compiled(**own(kwargs))
                yield chosen, output, expected
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
            made = self._run(self._given(model, inputs, Memory()), until="guards")
        with self._dense():
            return DryRun.of(made, self.passes, self.elastic)

    def untraced(self) -> Program:
        """A program with a manifest but nothing compiled yet."""
        return Program(self._source().manifest(self.widths), {}, {}, {})

    def _given(self, model: nn.Module, inputs: Inputs, memory: Memory, program: Program | None = None) -> Compilation:
        """What a run of the passes begins with: the first one, or one that adds to `program`."""
        self._runs += 1
        return Compilation(
            model,
            self.told(inputs) if isinstance(inputs, Mapping) else [self.told(one) for one in inputs],
            timestep=self.timestep if program is None else program.manifest.timestep,
            narrow=self.elastic.narrow if self.elastic is not None else None,
            widths=self.widths,
            time_dim=self.elastic.router_config.time_dim if self.elastic is not None and self._unrouted else None,
            memory=memory,
            stated=self.stated,
            program=self.untraced() if program is None else program,
        )

    def _run(self, compilation: Compilation, until: str | None = None) -> Compilation:
        folder = self.dump if self.dump is None or self._runs < 2 else self.dump / f"run-{self._runs}"
        with self._dense():
            return run_passes(compilation, self.passes, until, folder)

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """The base model in eval mode without an elastic model's hooks.

        Adapters that add nothing, as they are fused or switched off, are left out of sight.
        """
        hooks = self.elastic.detached() if self.elastic is not None else nullcontext()
        with hooks, adapters_aside(self.model, adds_nothing), undisturbed(self.model):
            yield

    def _source(self) -> Source:
        return Source(
            model=type(self.model).__name__,
            config=config_of(self.model),
            dtype=str(dtype_of(self.model)).removeprefix("torch."),
            timestep=self.timestep or "timestep",
            arguments=argument_names(self.model.forward),
            telling_none=telling_none(self.model.forward),
            router=self.elastic.router_config if self.elastic is not None else None,
            policy=self.policy.to_spec(),
            attributes=attributes_of(self.model),
        )


def _nothing(model: nn.Module, reports: Sequence[Any]) -> str:
    reasons = [f"{refusal.where}: {refusal.reason}" for report in reports for refusal in report.refused]
    return f"no block of {type(model).__name__} can be guarded. " + ("; ".join(reasons) or "It has no list of modules")
