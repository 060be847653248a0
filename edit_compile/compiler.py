"""From a model to a compiled transformer: traced at the first call, as torch.compile does, or ahead of time."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edit_compile.dry_run import DryRun
from edit_compile.elastic import ElasticTransformer
from edit_compile.layout import layout_of
from passes.assemble import Source, assemble, plan_groups
from passes.check import check_equal, masked
from passes.graph import Report
from passes.pipeline import Analysis, analyse
from passes.preview import preview_glue
from passes.record import undisturbed
from passes.weightless import UNCHECKED, weightless
from runtime import engines
from runtime.base.errors import EditError
from runtime.bundle import files as bundle
from runtime.bundle.program import Program
from runtime.face.arguments import argument_names
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import Decider, RoutingPolicy, ScheduledPolicy

WIDTHS = (0.25, 0.5, 0.75, 1.0)
Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]

log = logging.getLogger(__name__)


class CompileError(EditError, ValueError):
    """An argument of `compile` makes no sense, or the model cannot be compiled; the message says what to change."""


def compile(
    model: nn.Module,
    widths: Sequence[float] = WIDTHS,
    *,
    inputs: Inputs | None = None,
    engine: str = "onnxruntime",
    policy: Decider | None = None,
    output: str | Path | None = None,
    dry_run: bool = False,
    timestep: str | None = None,
    dispatch: str = "host",
) -> CompiledTransformer | DryRun:
    """Compile a diffusion transformer into router-guarded blocks at several MLP widths.

    Args:
        model: an ElasticTransformer, or any DiT (whose blocks are then always computed in full, with a warning).
        widths: shares of the MLPs' hidden channels to build, in (0, 1], 1 among them.
        inputs: keyword arguments of the model's forward, or a list of them, one for each set of shapes to compile for.
            Without them the model is traced at the first call, and again for shapes not seen before.
        engine: "onnxruntime", "torch" or "inductor", or what `runtime.engines.NAMES` has for a GPU.
        policy: decides per row what each block does; default: the elastic model's own, else `RoutingPolicy()`,
            Algorithm 1. The bundle keeps it.
        output: folder to write the bundle to (needs `inputs`), once the engine agrees with the model at every width.
        dry_run: give a report of what would be compiled instead (needs `inputs`). Of a model on the meta device too,
            which takes neither its memory nor its time: what needs numbers is then `unchecked`.
        timestep: name of the forward's timestep argument, where it cannot be told.
        dispatch: "host", or "device" to take decisions on a GPU (see CompiledTransformer).

    Raises:
        CompileError: see above; also where no block of the model can be guarded.
    """
    if isinstance(model, CompiledTransformer):
        raise CompileError(
            "this is compiled already: give compile() the model, or the elastic model, that it was made of"
        )
    tracer = Tracer(model, check_widths(widths), timestep)
    engines.check_name(engine)
    if output is not None:
        bundle.check_place(Path(output))
    if (dry_run or output is not None) and inputs is None:
        wanted = "dry_run" if dry_run else "output"
        raise CompileError(f"{wanted} needs inputs: the keyword arguments of one call of the model's forward")
    if dry_run:
        return tracer.dry_run(inputs)  # type: ignore[arg-type]
    if weightless(tracer.model):
        raise CompileError(
            f"{type(tracer.model).__name__} has no weights, its parameters are on the meta device: "
            "load them, or ask for dry_run=True"
        )
    if not tracer.routers:
        warnings.warn(
            f"{type(model).__name__} has no routers, so no block will be skipped or narrowed: "
            "edit_compile.elasticize(model) makes it elastic; a ScheduledPolicy decides without routers",
            stacklevel=2,
        )
    program = tracer.trace(inputs) if inputs is not None else tracer.untraced()
    compiled = CompiledTransformer(
        program, engine, policy or tracer.policy, tracer, host=tracer.host, eager=tracer.model, dispatch=dispatch
    )
    if output is not None:
        tracer.prove(compiled)
        compiled.save(output)
    return compiled


def check_widths(widths: Sequence[float]) -> tuple[float, ...]:
    """`widths` ascending; CompileError where one is outside (0, 1], where 1 is missing or one is there twice."""
    values = tuple(sorted(float(width) for width in widths))
    wrong = [width for width in values if not 0.0 < width <= 1.0]
    if wrong:
        raise CompileError(f"width {wrong[0]} is outside (0, 1]: a width is a share of the MLP's hidden channels")
    if len({round(100 * width) for width in values}) != len(values):
        raise CompileError(f"widths {values} name a width twice (they are told apart by whole percents)")
    if not values or values[-1] != 1.0:
        raise CompileError(f"widths {values} lack 1: blocks must also be able to run in full")
    return values


class Tracer:
    """Makes a program of a model for all the shapes it has been shown; called with the kwargs of an unseen call."""

    def __init__(self, model: nn.Module, widths: tuple[float, ...], timestep: str | None) -> None:
        self.elastic = model if isinstance(model, ElasticTransformer) else None
        self.model = self.elastic.model if self.elastic is not None else model
        self.widths = widths
        self.timestep = timestep or (self.elastic.timestep if self.elastic is not None else None)
        self.buckets: list[Mapping[str, Any]] = []
        self.analysis: Analysis | None = None
        self.reports: tuple[Report, ...] = ()
        self._host: nn.Module | None = None

    @property
    def routers(self) -> bool:
        """Whether the model is elastic."""
        return self.elastic is not None

    @property
    def policy(self) -> RoutingPolicy:
        """The elastic model's own policy; the default one where it has none."""
        return (self.elastic.policy if self.elastic is not None else None) or RoutingPolicy()

    def __call__(self, kwargs: Mapping[str, Any]) -> Program:
        """The program that also covers a call with `kwargs`."""
        return self.trace([*self.buckets, kwargs])

    def trace(self, inputs: Inputs) -> Program:
        """The program for `inputs`; CompileError where no block can be guarded."""
        buckets = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        analysis = self._analyse(buckets)
        _log(analysis.reports)
        if not analysis.groups:
            raise CompileError(_nothing(self.model, analysis.reports))
        if self.elastic is not None:
            self._check_routers(self.elastic, analysis)
        with self._dense():
            planned, widths = plan_groups(analysis, self.widths)
            assembled = assemble(analysis, planned, self._source(), self.widths)
        self.reports = (*analysis.reports, *widths, *assembled.reports)
        _log(self.reports[len(analysis.reports) :])
        self.buckets = [pytree.tree_map_only(Tensor, Tensor.clone, dict(bucket)) for bucket in buckets]
        self.analysis, self._host = analysis, assembled.host
        return assembled.program

    def host(self, **kwargs: Any) -> Any:
        """The guarded model's forward, for programs whose glue is hosted."""
        assert self._host is not None
        return self._host(**kwargs)

    def _check_routers(self, elastic: ElasticTransformer, analysis: Analysis) -> None:
        """Every block found has a router, and every width that it may choose is built."""
        if elastic.layout is None:
            elastic.attach(layout_of(analysis, elastic.router_config.time_dim))
        routed = {block.name for block in elastic.layout.blocks} if elastic.layout else set()
        strange = [site.name for site in analysis.discovery.blocks if site.name not in routed]
        if strange:
            raise CompileError(f"{strange[0]} has no router: elasticize the model with the inputs it is compiled with")
        absent = [width for width in elastic.router_config.widths if width not in self.widths]
        if absent:
            raise CompileError(
                f"the routers choose among {elastic.router_config.widths}, but width {absent[0]} is not built"
            )

    def prove(self, compiled: CompiledTransformer) -> None:
        """Compare what the engine runs with the masked eager model at every width (equation 13) and every bucket.

        Raises CheckError; the compiled transformer's policy and counters are put back.
        """
        with closing(self.at_widths(compiled)) as outputs:
            for width, output, expected in outputs:
                check_equal(output, expected, f"the {compiled.engine} engine at width {width}")

    def at_widths(self, compiled: CompiledTransformer) -> Generator[tuple[float, Any, Any], None, None]:
        """(width, what `compiled` gives, what the masked eager model gives) at every width and every bucket.

        Close it: the policy is put back then.
        """
        assert self.analysis is not None
        policy = compiled.policy
        blocks = self.analysis.discovery.blocks
        try:
            for kwargs, width in itertools.product(self.buckets, self.widths):
                compiled.policy = ScheduledPolicy(np.full((1, len(blocks)), width))
                compiled._reset_stateful_cache()
                with self._dense(), ExitStack() as masks:
                    for site, owner in zip(blocks, self.analysis.group_of, strict=True):
                        masks.enter_context(masked(site.module, self.analysis.groups[owner].sites, width))
                    expected = self.model(**kwargs)
                yield width, compiled(**kwargs), expected
        finally:
            compiled._reset_stateful_cache()
            compiled.policy = policy
            compiled.trace.clear()
            compiled.reset_counters()

    def dry_run(self, inputs: Inputs) -> DryRun:
        """What `trace` would make of `inputs`, nothing lowered; by shapes and data flow where there are no weights.

        Raises CompileError where a model without weights cannot be followed that way.
        """
        if not weightless(self.model):
            return self._preview(inputs)
        with self._dense():  # the copy is one without the elastic model's hooks
            self.model = copy.deepcopy(self.model).to("meta")
        try:
            bare = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)
            return replace(self._preview(bare), unchecked=UNCHECKED)
        except EditError:
            raise
        except Exception as error:
            told = str(error).strip().splitlines() or [""]
            raise CompileError(
                f"{type(self.model).__name__} cannot be followed without weights, load them for the dry run: "
                f"{type(error).__name__}: {told[0]}"
            ) from error

    def _preview(self, inputs: Inputs) -> DryRun:
        analysis = self._analyse(inputs)
        if self.elastic is not None and self.elastic.layout is None and analysis.groups:
            self.elastic.attach(layout_of(analysis, self.elastic.router_config.time_dim))
        with self._dense():
            planned, reports = plan_groups(analysis, self.widths)
            glue = preview_glue(analysis)
        return DryRun.of(analysis, planned, (*analysis.reports, *reports, *glue), self.elastic)

    def untraced(self) -> Program:
        """A program with a manifest but nothing compiled yet."""
        return Program(self._source().manifest(self.widths), {}, {}, {})

    def _analyse(self, inputs: Inputs) -> Analysis:
        with self._dense():
            narrow = self.elastic.narrow if self.elastic is not None else None
            return analyse(self.model, inputs, self.timestep, narrow)

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """The base model in eval mode without an elastic model's hooks; without a warning that every export repeats."""
        hooks = self.elastic.detached() if self.elastic is not None else nullcontext()
        with hooks, undisturbed(self.model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
            yield

    def _source(self) -> Source:
        routers = self.elastic.router_tensors() if self.elastic is not None else None
        return Source(
            model=type(self.model).__name__,
            config=_config(self.model),
            dtype=str(_dtype(self.model)).removeprefix("torch."),
            timestep=self.timestep or "timestep",
            arguments=argument_names(self.model.forward),
            router=self.elastic.router_config if self.elastic is not None else None,
            routers=routers,
            attributes=_attributes(self.model),
        )


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
    return f"no block of {type(model).__name__} can be guarded. " + ("; ".join(reasons) or "It has no ModuleList")


def _log(reports: Sequence[Any]) -> None:
    for report in reports:
        for line in report.done:
            log.info("%s: %s", report.name, line)
        for refusal in report.refused:
            log.info("%s: left %s alone: %s", report.name, refusal.where, refusal.reason)
