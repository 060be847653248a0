"""From a model to a compiled transformer: traced at the first call, as torch.compile does, or ahead of time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from edit_compile.compiling.dry_run import DryRun
from edit_compile.compiling.tracer import CompileError, Tracer
from edit_compile.elastic.block_hooks import carries_hooks
from edit_compile.elastic.layout import PASSES
from edit_compile.elastic.recorded_inputs import Inputs, RecordedCalls, first_trace, inputs_for
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.progress import shown
from passes.graphs.progress import tell
from passes.graphs.weightless import weightless
from passes.observe.statement import BlockStatement
from passes.pipeline import Pass
from passes.program.assemble import owned
from runtime import engines
from runtime.bundle import files as bundle
from runtime.bundle.program import Program
from runtime.face.arguments import find_glue, flatten
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import Decider, RoutingPolicy

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def compile(
    model: nn.Module,
    widths: Sequence[float] = WIDTHS,
    *,
    inputs: Inputs | RecordedCalls | None = None,
    engine: str | None = None,
    policy: Decider | None = None,
    output: str | Path | None = None,
    dry_run: bool = False,
    timestep: str | None = None,
    dispatch: str = "host",
    passes: Sequence[Pass] | None = None,
    dump: str | Path | None = None,
    blocks: BlockStatement | Sequence[BlockStatement] | None = None,
) -> CompiledTransformer | DryRun:
    """Compile a diffusion transformer into router-guarded blocks at several MLP widths.

    Args:
        model: an ElasticTransformer, or any DiT, whose blocks only a schedule or a tier skips (`tune`); a warning where
            nothing does, or where routers were never trained.
        widths: shares of the MLPs' hidden channels to build, in (0, 1], 1 among them.
        inputs: keyword arguments of the model's forward, or a list of them, one for each set of shapes to compile for;
            or a `Recording` of its calls, which has one for each form in which it was called. Without them the model is
            traced at the first call. A call in another form (shapes, dtypes, which arguments are given) adds to what is
            compiled, whichever it was.
        engine: "onnxruntime", "torch" or "inductor", or what `runtime.engines.NAMES` has for a GPU; default: the
            fastest here for the model's blocks, measured once (`compiled.engine_choice` says by what).
        policy: decides per row what each block does; default: the elastic model's own, else `RoutingPolicy()`,
            Algorithm 1. The bundle keeps it.
        output: folder to write the bundle to (needs `inputs`), once the engine agrees with the model at every width.
            On a CPU the weights that run are then the bundle's, mapped from its file: memory never holds them twice.
        dry_run: give a report of what would be compiled instead (needs `inputs`). Of a model on the meta device too,
            which takes neither its memory nor its time: what needs numbers is then `unchecked`.
        timestep: name of the forward's timestep argument, where it cannot be told.
        dispatch: "host", or "device" to take decisions on a GPU (see CompiledTransformer).
        passes: what to run instead of `edit_compile.PASSES`: the list without some, or with others of one's own.
        dump: folder for the state after each pass, graphs among it, as text; default: what the environment variable
            EDIT_COMPILE_DUMP says.
        blocks: what cannot be found by running the model: which argument a block's output continues, where the batch
            is. An elastic model keeps what was given to `elasticize`.

    Raises:
        CompileError: see above; also where no block of the model can be guarded.
        PassError (an EditError): `passes` cannot run: one that is needed is missing, or stands in another place.
        StatementError (an EditError): what `blocks` says does not fit the model.
        CheckError (an EditError): what was made does not compute what the model does.
    """
    if isinstance(model, CompiledTransformer):
        raise CompileError(
            "this is compiled already: give compile() the model, or the elastic model, that it was made of"
        )
    if not isinstance(model, ElasticTransformer) and carries_hooks(model):
        raise CompileError(
            f"this {type(model).__name__} is inside an elastic model, whose hooks are on its blocks: "
            "give compile() the elastic model, or the model loaded anew"
        )
    dump = dump or os.environ.get("EDIT_COMPILE_DUMP") or None
    tracer = Tracer(model, check_widths(widths), timestep, policy, PASSES if passes is None else passes, dump, blocks)
    if engine is not None:
        engines.check_name(engine)
    if output is not None:
        bundle.check_place(Path(output))
    if (dry_run or output is not None) and inputs is None:
        wanted = "dry_run" if dry_run else "output"
        raise CompileError(f"{wanted} needs inputs: the keyword arguments of one call of the model's forward")
    if dry_run:
        assert inputs is not None
        return tracer.dry_run(first_trace(tracer.model, inputs))
    if weightless(tracer.model):
        raise CompileError(
            f"{type(tracer.model).__name__} has no weights, its parameters are on the meta device: "
            "load them, or ask for dry_run=True"
        )
    if policy is None or isinstance(policy, RoutingPolicy):
        _warn_of_routers(model, isinstance(inputs, RecordedCalls))
    program = tracer.untraced() if inputs is None else _traced(tracer, inputs)
    mapped = output is not None and all(weight.device.type == "cpu" for weight in program.weights.values())
    if not mapped:
        program = owned(program, tracer.model)
    with shown(f"compiling {type(tracer.model).__name__}"):
        if engine is None and program.manifest.blocks:
            tell("choosing an engine, for up to a minute where none was chosen for such blocks on this machine", 0, 1)
        compiled = CompiledTransformer(
            program, engine, policy or tracer.policy, tracer, host=tracer.host, eager=tracer.model, dispatch=dispatch
        )
    if output is not None:
        assert inputs is not None
        tracer.prove(compiled, inputs_for(tracer.model, inputs))
        digest = compiled.save(output)
        if mapped:
            stored = bundle.load(output, verify=False)
            # whoever writes to the same place may have put another bundle there meanwhile
            compiled.hold(stored if stored.digest == digest else owned(compiled.program, tracer.model))
    return compiled


def _warn_of_routers(model: nn.Module, recorded: bool) -> None:
    """Say so where no router will ever skip or narrow a block, since there is none, or since none was trained."""
    kind, first = type(model).__name__, "" if recorded else "record some generations (edit_compile.record) and "
    if not isinstance(model, ElasticTransformer):
        warnings.warn(
            f"{kind} has no routers, so no block will be skipped or narrowed by itself: {first}let "
            "edit_compile.tune find steps to reuse in, or edit_compile.elasticize(model) and train",
            stacklevel=3,
        )
    elif model.untrained:
        warnings.warn(
            f"the routers of {type(model.model).__name__} were never trained, so every block will be computed in full: "
            "train them (edit-compile train; the dense model's outputs can be what they learn), or "
            f"{first}let edit_compile.tune find schedules, which need none",
            stacklevel=3,
        )


def _traced(tracer: Tracer, inputs: Inputs | RecordedCalls) -> Program:
    """A program for `inputs`; recorded ones may differ in what one trace cannot hold, so the others are added."""
    program = tracer.trace(first_trace(tracer.model, inputs))
    forms = inputs_for(tracer.model, inputs) if isinstance(inputs, RecordedCalls) else ()
    for form in forms:
        assert isinstance(form, Mapping)
        if find_glue(program.manifest.glues, *flatten(tracer.told(form))) is None:
            program = tracer.grow(form, program)
    return program


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
